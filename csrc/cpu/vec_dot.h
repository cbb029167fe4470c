// Dot products of rows, the inner loop of every op that reads weights. Included by for_each_isa.h.
//
// A dot product adds in one order only: lane by lane over the width, then the lanes. However many
// rows share a pass, a row's bits stay the same.

// acc += products of as many values as one step takes
template <class T>
struct Step {
  static constexpr int kWidth = kLanes;
  typedef Vec Values;
  static Values read(const T* from) { return load(from); }
  static Values read_first(const T* from, int64_t count) { return load_first(from, count); }
  static Vec add(Vec acc, Values x, Values w) { return acc + x * w; }
};

#ifdef LEGO_HAS_DPBF16
template <>
struct Step<bf16> {
  static constexpr int kWidth = 2 * kLanes;
  typedef __m512bh Values;
  static Values read(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Values read_first(const bf16* from, int64_t count) {
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, from);
  }
  static Vec add(Vec acc, Values x, Values w) { return (Vec)_mm512_dpbf16_ps((__m512)acc, x, w); }
};
#endif

// out[r * out_stride + n] = x[r] . w[n] for R rows of x and N rows of w, each `width` long
template <int R, int N, class T>
inline void dot_block(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t width, float* out,
                      int64_t out_stride) {
  typedef Step<T> S;
  Vec acc[R][N] = {};
  int64_t i = 0;
  const auto add = [&](const auto& read) __attribute__((always_inline)) {
    typename S::Values row[R];
    for (int r = 0; r < R; ++r) row[r] = read(x + r * x_stride);
    for (int n = 0; n < N; ++n) {
      const typename S::Values weight = read(w + n * w_stride);
      __builtin_prefetch(w + (n + N) * w_stride + i);  // the row that is next in this one's place
      for (int r = 0; r < R; ++r) acc[r][n] = S::add(acc[r][n], row[r], weight);
    }
  };
  for (; i + S::kWidth <= width; i += S::kWidth) {
    add([&](const T* from) __attribute__((always_inline)) { return S::read(from + i); });
  }
  if (i < width) {
    add([&](const T* from) __attribute__((always_inline)) { return S::read_first(from + i, width - i); });
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) out[r * out_stride + n] = sum(acc[r][n]);
  }
}

template <int R, class T>
inline void dot_rows(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t num_w, int64_t width,
                     float* out, int64_t out_stride) {
  // as many sums at once as hide the latency of one and fit in the registers
  constexpr int N = R == 1 ? 8 : 4;
  int64_t n = 0;
  for (; n + N <= num_w; n += N) {
    dot_block<R, N>(x, x_stride, w + n * w_stride, w_stride, width, out + n, out_stride);
  }
  for (; n < num_w; ++n) {
    dot_block<R, 1>(x, x_stride, w + n * w_stride, w_stride, width, out + n, out_stride);
  }
}

// out[r * out_stride + n] = x[r] . w[n] for all rows of x and of w. The rows of w are read from
// memory once if num_w * width values fit in the second-level cache, however many rows x has.
template <class T>
inline void dot_products(const T* x, int64_t x_stride, int64_t num_x, const T* w, int64_t w_stride,
                         int64_t num_w, int64_t width, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 4 <= num_x; r += 4) {
    dot_rows<4>(x + r * x_stride, x_stride, w, w_stride, num_w, width, out + r * out_stride, out_stride);
  }
  for (; r < num_x; ++r) {
    dot_rows<1>(x + r * x_stride, x_stride, w, w_stride, num_w, width, out + r * out_stride, out_stride);
  }
}
