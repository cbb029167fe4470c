// RMSNorm of a row, for every op that norms. Included by for_each_isa.h.

// 1 / sqrt(mean(x^2) + eps)
template <class T>
inline float inverse_rms(const T* x, int64_t size, float eps) {
  Vec squares[2] = {};
  const auto square = [&](int64_t i, Vec value) { squares[i / kLanes % 2] += value * value; };
  for_each_vec(
      size, [&](int64_t i) { square(i, load(x + i)); },
      [&](int64_t i, int64_t rest) { square(i, load_first(x + i, rest)); });
  return 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / static_cast<float>(size) + eps);
}

// out = x / sqrt(mean(x^2) + eps) * weight, rounded to T
template <class T>
inline void norm_row(const T* x, const T* weight, float eps, int64_t size, T* out) {
  const float scale = inverse_rms(x, size, eps);
  for_each_vec(
      size, [&](int64_t i) { store(out + i, load(x + i) * scale * load(weight + i)); },
      [&](int64_t i, int64_t rest) {
        store_first(out + i, load_first(x + i, rest) * scale * load_first(weight + i, rest), rest);
      });
}
