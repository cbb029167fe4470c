#ifdef LEGO_ISA_PASS

// y[B, N] rows [begin, end) of w: y[b, n] = x[b] . w[n]
template <class T>
void linear_small(const T* x, int64_t x_stride, int64_t B, const T* w, int64_t w_stride, int64_t begin,
                  int64_t end, int64_t D, T* y, int64_t y_stride) {
  constexpr int64_t kTile = 64;
  float tile[16 * kTile];
  const int64_t step = rows_that_stay<T>(D, kTile);
  for (int64_t n = begin; n < end; n += step) {
    const int64_t count = end - n < step ? end - n : step;
    dot_products(x, x_stride, B, w + n * w_stride, w_stride, count, D, tile, kTile);
    for (int64_t b = 0; b < B; ++b) {
      const float* from = tile + b * kTile;
      T* to = y + b * y_stride + n;
      for_each_vec(
          count, [&](int64_t i) { store(to + i, load(from + i)); },
          [&](int64_t i, int64_t rest) { store_first(to + i, load(from + i), rest); });
    }
  }
}

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "dtype.h"
#define LEGO_OP_FILE "linear_small.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

// x [B, D], w [N, D], y [B, N] of one dtype, B <= 16, last strides 1
void linear_small_cpu(const Tensor& x, const Tensor& w, Tensor y) {
  const int64_t B = x.size(0), D = x.size(1), N = w.size(0);
  // here too, since the kernel's tile on the stack has no more rows
  LEGO_CHECK_VALUE(B <= 16, "linear_small: x must have at most 16 rows, got " << B);
  lego::with_dtype("linear_small", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto kernel = LEGO_KERNEL(linear_small<T>);
    const auto* from = static_cast<const T*>(x.data_ptr());
    const auto* weights = static_cast<const T*>(w.data_ptr());
    auto* to = static_cast<T*>(y.data_ptr());
    // 64 KiB of weights a thread at least: some 6 us of reading, which is what waking it costs
    const int64_t grain = std::max<int64_t>(64, (64 << 10) / std::max<int64_t>(1, D * sizeof(T)));
    torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
      kernel(from, x.stride(0), B, weights, w.stride(0), begin, end, D, to, y.stride(0));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("linear_small", TORCH_BOX(&linear_small_cpu)); }

#endif
