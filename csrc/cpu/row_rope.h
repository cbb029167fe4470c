// Rotary positions of a token's heads. Compiled once per instruction set, as for_each_isa.h says.

// what is left of x where it is kept as T
template <class T>
inline Vec rounded(Vec x) {
  T values[kLanes];
  store(values, x);
  return load(values);
}

// The heads of one token, 2 * half values each: RMS-normalised if there is a norm, and rounded to T
// as an RMSNorm of its own would; then component i of the first half is rotated with i of the second.
template <class T>
void rope_heads(const T* from, T* to, int64_t to_stride, int64_t num_heads, int64_t half, const float* cos,
                const float* sin, const T* norm, float eps) {
  for (int64_t h = 0; h < num_heads; ++h, from += 2 * half, to += to_stride) {
    const float scale = norm == nullptr ? 1.0f : inverse_rms(from, 2 * half, eps);
    const auto rotate = [&](int64_t i, const auto& read, const auto& write) {
      const auto value = [&](int64_t j) {
        return norm == nullptr ? read(from + j) : rounded<T>(read(from + j) * scale * read(norm + j));
      };
      const Vec first = value(i), second = value(half + i), c = read(cos + i), s = read(sin + i);
      write(to + i, first * c - second * s);
      write(to + half + i, second * c + first * s);
    };
    for_each_vec(
        half,
        [&](int64_t i) {
          rotate(i, [](const auto* x) { return load(x); }, [](T* x, Vec value) { store(x, value); });
        },
        [&](int64_t i, int64_t rest) {
          rotate(
              i, [&](const auto* x) { return load_first(x, rest); },
              [&](T* x, Vec value) { store_first(x, value, rest); });
        });
  }
}
