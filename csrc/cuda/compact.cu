#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "compact.cuh"
#include "launch.h"

namespace {

using torch::stable::Tensor;

// Contract of compact_cpu. No rows launch all the same: their count is 0, and has to be written.
void compact_cuda(const Tensor& exit, const Tensor& alive, Tensor index, Tensor count) {
  const lego::LaunchGuard guard(count);
  const lego::CompactArgs args{static_cast<const bool*>(exit.data_ptr()),
                               static_cast<const bool*>(alive.data_ptr()),
                               exit.stride(0),
                               alive.stride(0),
                               static_cast<int64_t*>(index.data_ptr()),
                               static_cast<int64_t*>(count.data_ptr()),
                               exit.size(0)};
  lego::compact_kernel<<<1, 32 * lego::kCompactWarps, 0, guard.stream()>>>(args);
  lego::check_launch("compact");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CUDA, m) { m.impl("compact", TORCH_BOX(&compact_cuda)); }
