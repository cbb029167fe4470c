#ifdef LEGO_ISA_PASS

#include "row_swiglu.h"

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "dtype.h"
#include "rows.h"
#define LEGO_OP_FILE "swiglu.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

// gate_up [..., 2F] and out [..., F] of one dtype, last strides 1
void swiglu_cpu(const Tensor& gate_up, Tensor out) {
  if (out.numel() == 0) return;
  const int64_t F = out.size(out.dim() - 1);
  const lego::Rows from(gate_up), to(out);
  lego::with_dtype("swiglu", out.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto kernel = LEGO_KERNEL(swiglu_row<T>);
    const auto* gate_data = static_cast<const T*>(gate_up.data_ptr());
    auto* out_data = static_cast<T*>(out.data_ptr());
    // a thread gets 8,192 values at least: some 5 us, which is what waking it costs
    const int64_t grain = std::max<int64_t>(1, 8192 / F);
    torch::stable::parallel_for(0, from.num_rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernel(gate_data + from.offset(row), F, out_data + to.offset(row));
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("swiglu", TORCH_BOX(&swiglu_cpu)); }

#endif
