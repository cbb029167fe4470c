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

// Calls sums(r, n, v) with a vector v whose lanes add up to x[r] . w[n], for R rows of x and N rows of w. The
// steps go to two sums in turn, since each waits for its last addition: 1.2 times as fast as one from the
// cache.
template <int R, int N, class T, class Sums>
__attribute__((always_inline)) inline void dot_block(const T* x, int64_t x_stride, const T* w,
                                                     int64_t w_stride, int64_t width, const Sums& sums) {
  typedef Step<T> S;
  Vec acc[2][R][N] = {};
  const auto add = [&](int turn, int64_t i, const auto& read) __attribute__((always_inline)) {
    typename S::Values row[R];
    for (int r = 0; r < R; ++r) row[r] = read(x + r * x_stride + i);
    for (int n = 0; n < N; ++n) {
      const T* from = w + n * w_stride + i;
      const typename S::Values weight = read(from);
      // into the second-level cache: to the first level it was slower than none
      __builtin_prefetch(reinterpret_cast<const char*>(from) + (2 << 10), 0, 2);
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
    for (int n = 0; n < N; ++n) sums(r, n, acc[0][r][n] + acc[1][r][n]);
  }
}

// dot_products for R rows of x and the first rows of w, in N parts of `part` rows, a multiple of kLanes.
// The parts are read side by side: several streams get up to 1.4 times the bandwidth of one. Sums of lanes
// are made kLanes rows at a time, since for rows of 64 values they cost as much as the products.
template <int R, int N, class T>
inline void dot_parts(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t part, int64_t width,
                      float* out, int64_t out_stride) {
  for (int64_t i = 0; i < part; i += kLanes) {
    Vec products[R][N][kLanes];
    for (int j = 0; j < kLanes; ++j) {
      dot_block<R, N>(x, x_stride, w + (i + j) * w_stride, part * w_stride, width,
                      [&](int r, int n, Vec sum_of)
                          __attribute__((always_inline)) { products[r][n][j] = sum_of; });
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) store(out + r * out_stride + n * part + i, sum_each(products[r][n]));
    }
  }
}

// dot_products for R rows of x, N rows of w at a time
template <int R, int N, class T>
inline void dot_rows(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t num_w, int64_t width,
                     float* out, int64_t out_stride) {
  const int64_t part = num_w / (N * kLanes) * kLanes;
  dot_parts<R, N>(x, x_stride, w, w_stride, part, width, out, out_stride);
  const int64_t rest = (num_w - N * part) / kLanes * kLanes;
  dot_parts<R, 1>(x, x_stride, w + N * part * w_stride, w_stride, rest, width, out + N * part, out_stride);
  for (int64_t n = N * part + rest; n < num_w; ++n) {
    dot_block<R, 1>(x, x_stride, w + n * w_stride, w_stride, width,
                    [&](int r, int, Vec sum_of)
                        __attribute__((always_inline)) { out[r * out_stride + n] = sum(sum_of); });
  }
}

constexpr int64_t kMostRows = 4;      // of x in one pass over w
constexpr int64_t kBlockSums = 4096;  // dot products of a block, 16 KiB of the first-level cache

// How much of a product of num_x rows with a weight is done at once.
struct Blocks {
  int64_t num_x;     // rows of x
  int64_t num_sums;  // rows of w whose products fit in kBlockSums: a multiple of 256
  int64_t num_w;     // rows of w that one call of dot_products reads, at most num_sums
};

// Few rows of x pass w at once, and the longer its parts the better. More rows pass the same part of w
// again and again: 128 KiB, where the smallest second-level cache has twice that.
template <class T>
inline Blocks blocks_of(int64_t num_x, int64_t width) {
  if (num_x <= kMostRows) return {kMostRows, kBlockSums / kMostRows, kBlockSums / kMostRows};
  const int64_t row_bytes = width > 0 ? width * static_cast<int64_t>(sizeof(T)) : 1;
  const int64_t fitting = (128 << 10) / row_bytes / kLanes * kLanes;
  const int64_t most = kBlockSums / 16;
  return {16, most, fitting < kLanes ? kLanes : fitting < most ? fitting : most};
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
  constexpr int N = kLanes == 16 ? 2 : 1;
  pass(kMostRows, dot_rows<kMostRows, N, T>);
  pass(3, dot_rows<3, N, T>);
  pass(2, dot_rows<2, 2 * N, T>);
  pass(1, dot_rows<1, 4 * N, T>);
}
