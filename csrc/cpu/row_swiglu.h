// SwiGLU of one row. Compiled once per instruction set, as for_each_isa.h says.

// Divided, not multiplied by a reciprocal: a large negative gate gives -x / inf, -0 as in torch.
inline Vec silu_times(Vec gate, Vec up) { return gate / (1.0f + exp(-gate)) * up; }

// One row: out = silu(gate) * up, where up begins `size` values after gate.
template <class T>
void swiglu_row(const T* gate, int64_t size, T* out) {
  const T* up = gate + size;
  for_each_vec(
      size, [&](int64_t i) { store(out + i, silu_times(load(gate + i), load(up + i))); },
      [&](int64_t i, int64_t rest) {
        store_first(out + i, silu_times(load_first(gate + i, rest), load_first(up + i, rest)), rest);
      });
}
