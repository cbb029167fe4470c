#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace {

using torch::stable::Tensor;

// exit, alive bool [B] of any stride; index int64 [B], count int64 []
void compact_cpu(const Tensor& exit, const Tensor& alive, Tensor index, Tensor count) {
  const int64_t B = exit.size(0), exit_stride = exit.stride(0), alive_stride = alive.stride(0);
  const auto* exits = static_cast<const bool*>(exit.data_ptr());
  const auto* lives = static_cast<const bool*>(alive.data_ptr());
  auto* rows = static_cast<int64_t*>(index.data_ptr());
  int64_t found = 0;
  for (int64_t b = 0; b < B; ++b) {
    rows[found] = b;  // overwritten by the next row if this one stops
    found += lives[b * alive_stride] && !exits[b * exit_stride];
  }
  std::fill(rows + found, rows + B, -1);
  *static_cast<int64_t*>(count.data_ptr()) = found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("compact", TORCH_BOX(&compact_cpu)); }
