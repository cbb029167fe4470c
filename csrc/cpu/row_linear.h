// Rows times a weight. Compiled once per instruction set, as for_each_isa.h says.

constexpr int64_t kRowsAtOnce = 16;

// y[b, n] = x[b] . w[n] + bias[n], without the bias if it is null, for rows [begin, end) of w. A tile
// of w stays in the cache while all rows of x pass.
template <class T>
void linear_rows(const T* x, int64_t x_stride, int64_t B, const T* w, int64_t w_stride, const T* bias,
                 int64_t begin, int64_t end, int64_t D, T* y, int64_t y_stride) {
  constexpr int64_t kTile = 256;
  float tile[kRowsAtOnce * kTile];
  const int64_t step = rows_that_stay<T>(B, D, kTile);
  for (int64_t n = begin; n < end; n += step) {
    const int64_t count = end - n < step ? end - n : step;
    for (int64_t first = 0; first < B; first += kRowsAtOnce) {
      const int64_t rows = B - first < kRowsAtOnce ? B - first : kRowsAtOnce;
      dot_products(x + first * x_stride, x_stride, rows, w + n * w_stride, w_stride, count, D, tile, kTile);
      for (int64_t b = 0; b < rows; ++b) {
        const float* from = tile + b * kTile;
        T* to = y + (first + b) * y_stride + n;
        for_each_vec(
            count,
            [&](int64_t i) {
              const Vec sums = load(from + i);
              store(to + i, bias == nullptr ? sums : sums + load(bias + n + i));
            },
            [&](int64_t i, int64_t rest) {
              const Vec sums = load(from + i);
              store_first(to + i, bias == nullptr ? sums : sums + load_first(bias + n + i, rest), rest);
            });
      }
    }
  }
}
