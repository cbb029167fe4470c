#ifdef LEGO_ISA_PASS

#include "row_linear.h"

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
  lego::with_dtype("linear_small", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto kernel = LEGO_KERNEL(linear_rows<T>);
    const auto* from = static_cast<const T*>(x.data_ptr());
    const auto* weights = static_cast<const T*>(w.data_ptr());
    auto* to = static_cast<T*>(y.data_ptr());
    // 64 KiB of weights a thread at least: some 6 us of reading, which is what waking it costs
    const int64_t grain = std::max<int64_t>(64, (64 << 10) / std::max<int64_t>(1, D * sizeof(T)));
    torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
      kernel(from, x.stride(0), B, weights, w.stride(0), nullptr, begin, end, D, to, y.stride(0));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("linear_small", TORCH_BOX(&linear_small_cpu)); }

#endif
