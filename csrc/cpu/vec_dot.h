// Dot products of rows, the inner loop of every op that reads weights. Included by for_each_isa.h.
//
// A dot product adds in one order only: lane by lane over the width, then the lanes as sum() does.
// However many rows share a pass, a row's bits stay the same.

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

// Calls finish(r, n, v) where the lanes of v add up to x[r] . w[n], for R rows of x and N rows of w. The
// steps go to two sums in turn, since each waits for its last addition: 1.2 times as fast as one from the
// cache.
template <int R, int N, bool prefetch, class T, class Finish>
__attribute__((always_inline)) inline void dot_block(const T* x, int64_t x_stride, const T* w,
                                                     int64_t w_stride, int64_t width, const Finish& finish) {
  typedef Step<T> S;
  Vec acc[2][R][N] = {};
  const auto add = [&](int turn, int64_t i, const auto& read) __attribute__((always_inline)) {
    typename S::Values row[R];
    for (int r = 0; r < R; ++r) row[r] = read(x + r * x_stride + i);
    for (int n = 0; n < N; ++n) {
      const typename S::Values weight = read(w + n * w_stride + i);
      // the row that is next in this one's place, into the second-level cache: 1.2 to 1.5 times as
      // fast as none, where the first level gained nothing. One row after the other is left to the
      // hardware, which does better.
      if (prefetch) __builtin_prefetch(w + (n + N) * w_stride + i, 0, 2);
      for (int r = 0; r < R; ++r) acc[turn][r][n] = S::add(acc[turn][r][n], row[r], weight);
    }
  };
  const auto whole = [&](const T* from) __attribute__((always_inline)) { return S::read(from); };
  int64_t i = 0;
  for (; i + 2 * S::kWidth <= width; i += 2 * S::kWidth) {
    add(0, i, whole);
    add(1, i + S::kWidth, whole);
  }
  if (i + S::kWidth <= width) {
    add(0, i, whole);
    i += S::kWidth;
  }
  if (i < width) {
    const auto first = [=](const T* from)
                           __attribute__((always_inline)) { return S::read_first(from, width - i); };
    add(1, i, first);
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) finish(r, n, acc[0][r][n] + acc[1][r][n]);
  }
}

// dot_products for R rows of x, N rows of w at a time; where N is 1, G short ones, kLanes to a store
template <int R, int N, int G, class T>
inline void dot_rows(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t num_w, int64_t width,
                     float* out, int64_t out_stride) {
  int64_t n = 0;
  const auto add_up = [&](int r, int i, Vec products)
                          __attribute__((always_inline)) { out[r * out_stride + n + i] = sum(products); };
  if constexpr (N == 1) {
    // for rows of 64 values the sums of lanes cost as much as the products, unless they share them
    for (; n + kLanes <= num_w; n += kLanes) {
      Vec products[R][kLanes];
#pragma GCC unroll 4
      for (int i = 0; i < kLanes; i += G) {
        dot_block<R, G, false>(x, x_stride, w + (n + i) * w_stride, w_stride, width,
                               [&](int r, int m, Vec sum_of)
                                   __attribute__((always_inline)) { products[r][i + m] = sum_of; });
      }
      for (int r = 0; r < R; ++r) store(out + r * out_stride + n, sum_each(products[r]));
    }
  } else {
    for (; n + N <= num_w; n += N) {
      dot_block<R, N, true>(x, x_stride, w + n * w_stride, w_stride, width, add_up);
    }
  }
  for (; n < num_w; ++n) dot_block<R, 1, false>(x, x_stride, w + n * w_stride, w_stride, width, add_up);
}

// Rows of w, kLanes to `most` of them, that stay in the second-level cache while several rows of x pass:
// 128 KiB, where the smallest such cache has twice that.
template <class T>
inline int64_t rows_that_stay(int64_t width, int64_t most) {
  const int64_t row_bytes = width > 0 ? width * static_cast<int64_t>(sizeof(T)) : 1;
  const int64_t fitting = (128 << 10) / row_bytes / kLanes * kLanes;
  return fitting < kLanes ? kLanes : fitting < most ? fitting : most;
}

// out[r * out_stride + n] = x[r] . w[n] for all rows of x and of w, each `width` long. The rows of w
// are read from memory once if num_w * width values fit in the second-level cache, however many rows
// x has.
template <class T>
inline void dot_products(const T* x, int64_t x_stride, int64_t num_x, const T* w, int64_t w_stride,
                         int64_t num_w, int64_t width, float* out, int64_t out_stride) {
  const auto pass = [&](int num_rows, auto dot_rows_of) {
    for (; num_x >= num_rows; num_x -= num_rows, x += num_rows * x_stride, out += num_rows * out_stride) {
      dot_rows_of(x, x_stride, w, w_stride, num_w, width, out, out_stride);
    }
  };
  // what fits in 32 registers, or 16 without AVX-512
  constexpr int N = kLanes == 16 ? 8 : 4;
  // Rows below half a page: several streams at once, each soon at its end, halve what memory gives. But
  // where values have to be converted, rows at once share the conversion of x.
  typedef Step<T> S;
  constexpr bool converts = sizeof(typename S::Values) > S::kWidth * sizeof(T);
  const bool one_by_one = width * sizeof(T) < 2048 && !converts;
  const bool tiny = width * sizeof(T) <= 512;
  pass(4, dot_rows<4, N / 4, 1, T>);
  pass(2, one_by_one ? dot_rows<2, 1, 1, T> : dot_rows<2, N / 2, 1, T>);
  pass(1, tiny ? dot_rows<1, 1, 4, T> : one_by_one ? dot_rows<1, 1, 1, T> : dot_rows<1, N, 1, T>);
}
