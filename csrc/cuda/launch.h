#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "kv_heads.cuh"

namespace lego {

// Makes the device of a tensor current while it lives, and names the stream to launch on.
class LaunchGuard {
 public:
  explicit LaunchGuard(const torch::stable::Tensor& x)
      : device_(x.get_device_index()), guard_(x.get_device_index()) {}

  cudaStream_t stream() const {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &current));
    return static_cast<cudaStream_t>(current);
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel must launch, got ", cudaGetErrorString(error));
}

// The stride of a dimension of size 1 is arbitrary, and must not cost the wide path.
inline int64_t stride_bytes(const torch::stable::Tensor& x, int64_t dim) {
  return x.size(dim) > 1 ? x.stride(dim) * static_cast<int64_t>(x.element_size()) : 0;
}

inline KvHeads heads_of(const torch::stable::Tensor& x) {
  return {static_cast<char*>(x.data_ptr()), stride_bytes(x, 0), stride_bytes(x, 1), stride_bytes(x, 2)};
}

}  // namespace lego
