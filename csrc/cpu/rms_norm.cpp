#ifdef LEGO_ISA_PASS

#include "row_rms_norm.h"

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "dtype.h"
#include "rows.h"
#define LEGO_OP_FILE "rms_norm.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

// x, residual, out [..., D] and weight [D] of one dtype, last strides 1
void rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, std::optional<Tensor> residual,
                  Tensor out) {
  if (x.numel() == 0) return;
  const int64_t D = x.size(x.dim() - 1);
  const lego::Rows from(x), sums(residual ? *residual : x), to(out);
  lego::with_dtype("rms_norm", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto kernel = LEGO_KERNEL(rms_norm_row<T>);
    const auto* x_data = static_cast<const T*>(x.data_ptr());
    const auto* weight_data = static_cast<const T*>(weight.data_ptr());
    auto* residual_data = residual ? static_cast<T*>(residual->data_ptr()) : nullptr;
    auto* out_data = static_cast<T*>(out.data_ptr());
    // a thread gets 16,384 values at least: some 5 us, which is what waking it costs
    const int64_t grain = std::max<int64_t>(1, 16384 / D);
    torch::stable::parallel_for(0, from.num_rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernel(x_data + from.offset(row), weight_data, static_cast<float>(eps),
               residual_data ? residual_data + sums.offset(row) : nullptr, D, out_data + to.offset(row));
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu)); }

#endif
