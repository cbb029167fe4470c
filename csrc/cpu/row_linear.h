// Rows times a weight. Compiled once per instruction set, as for_each_isa.h says.

// y[b, n] = x[b] . w[n] + bias[n], without the bias if it is null, for rows [begin, end) of w.
template <class T>
void linear_rows(const T* x, int64_t x_stride, int64_t B, const T* w, int64_t w_stride, const T* bias,
                 int64_t begin, int64_t end, int64_t D, T* y, int64_t y_stride) {
  const Blocks blocks = blocks_of<T>(B, D);
  float sums[kBlockSums];
  for (int64_t n = begin; n < end; n += blocks.num_w) {
    const int64_t count = end - n < blocks.num_w ? end - n : blocks.num_w;
    for (int64_t first = 0; first < B; first += blocks.num_x) {
      const int64_t rows = B - first < blocks.num_x ? B - first : blocks.num_x;
      dot_products(x + first * x_stride, x_stride, rows, w + n * w_stride, w_stride, count, D, sums,
                   blocks.num_sums);
      for (int64_t b = 0; b < rows; ++b) {
        const float* from = sums + b * blocks.num_sums;
        T* to = y + (first + b) * y_stride + n;
        for_each_vec(
            count,
            [&](int64_t i) {
              const Vec sum = load(from + i);
              store(to + i, bias == nullptr ? sum : sum + load(bias + n + i));
            },
            [&](int64_t i, int64_t rest) {
              const Vec sum = load(from + i);
              store_first(to + i, bias == nullptr ? sum : sum + load_first(bias + n + i, rest), rest);
            });
      }
    }
  }
}
