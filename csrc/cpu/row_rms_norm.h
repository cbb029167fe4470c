// Residual and RMSNorm of one row. Compiled once per instruction set, as for_each_isa.h says.

// residual += x, rounded to T
template <class T>
void add_row(const T* x, int64_t D, T* residual) {
  for_each_vec(
      D, [&](int64_t i) { store(residual + i, load(residual + i) + load(x + i)); },
      [&](int64_t i, int64_t rest) {
        store_first(residual + i, load_first(residual + i, rest) + load_first(x + i, rest), rest);
      });
}

// One row: residual += x first, if there is one, and then the sum is normed. It is rounded to T before,
// as the residual that later layers will read.
template <class T>
void rms_norm_row(const T* x, const T* weight, float eps, T* residual, int64_t D, T* out) {
  if (residual != nullptr) {
    add_row(x, D, residual);
    x = residual;
  }
  norm_row(x, weight, eps, D, out);
}
