#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../check.h"
#include "launch.h"
#include "rope_kv_append.cuh"

namespace {

using torch::stable::Tensor;

constexpr int kMaxThreads = 256;

template <typename T, int N>
void launch(lego::RopeKvAppendArgs args, cudaStream_t stream) {
  args.lanes = lego::rope_lanes(args.half / N);
  const int num_heads = args.Hq + 2 * args.Hkv;
  const int64_t threads = std::min<int64_t>(kMaxThreads, (int64_t{num_heads} * args.lanes + 31) / 32 * 32);
  const int64_t heads_per_block = threads / args.lanes;
  const int64_t blocks = (num_heads + heads_per_block - 1) / heads_per_block;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.B * args.T, INT32_MAX)),
                  static_cast<unsigned>(std::min<int64_t>(blocks, 65535)));
  lego::rope_kv_append_kernel<T, N><<<grid, static_cast<unsigned>(threads), 0, stream>>>(args);
}

template <typename T>
void launch_widest(const lego::RopeKvAppendArgs& args, cudaStream_t stream) {
  if (lego::rope_is_aligned(args, sizeof(T))) {
    launch<T, 16 / sizeof(T)>(args, stream);
  } else {
    launch<T, 1>(args, stream);
  }
}

const void* data_of(const std::optional<Tensor>& x) { return x ? x->data_ptr() : nullptr; }

lego::RopeKvAppendArgs make_args(const Tensor& q_out, const Tensor& k_cache, const Tensor& v_cache,
                                 const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                                 const Tensor& position, const Tensor& slot) {
  lego::RopeKvAppendArgs args{};
  args.q_out = lego::heads_of(q_out);
  args.k_cache = lego::heads_of(k_cache);
  args.v_cache = lego::heads_of(v_cache);
  args.qkv = {static_cast<char*>(qkv.data_ptr()), lego::stride_bytes(qkv, 0), lego::stride_bytes(qkv, 1),
              q_out.size(3) * static_cast<int64_t>(qkv.element_size())};
  args.cos = static_cast<const float*>(cos.data_ptr());
  args.sin = static_cast<const float*>(sin.data_ptr());
  args.cos_stride = cos.stride(0);
  args.sin_stride = sin.stride(0);
  args.position = static_cast<const int64_t*>(position.data_ptr());
  args.slot = static_cast<const int64_t*>(slot.data_ptr());
  args.position_stride = position.stride(0);
  args.slot_stride = slot.stride(0);
  args.B = q_out.size(0);
  args.T = q_out.size(1);
  args.S = k_cache.size(1);
  args.P = cos.size(0);
  args.Hq = static_cast<int>(q_out.size(2));
  args.Hkv = static_cast<int>(k_cache.size(2));
  args.half = static_cast<int>(q_out.size(3) / 2);
  return args;
}

// Contract of rope_kv_append_cpu, except that a row whose position or slot is out of range is not
// written: reporting it would make the host wait.
void rope_kv_append_cuda(Tensor q_out, Tensor k_cache, Tensor v_cache, const Tensor& qkv, const Tensor& cos,
                         const Tensor& sin, const Tensor& position, const Tensor& slot,
                         std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double eps) {
  if (q_out.numel() == 0) return;
  const lego::LaunchGuard guard(q_out);
  lego::RopeKvAppendArgs args = make_args(q_out, k_cache, v_cache, qkv, cos, sin, position, slot);
  args.q_norm = data_of(q_norm);
  args.k_norm = data_of(k_norm);
  args.eps = static_cast<float>(eps);
  const auto dtype = q_out.scalar_type();
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      launch_widest<float>(args, guard.stream());
      break;
    case torch::headeronly::ScalarType::BFloat16:
      launch_widest<__nv_bfloat16>(args, guard.stream());
      break;
    case torch::headeronly::ScalarType::Half:
      launch_widest<__half>(args, guard.stream());
      break;
    default:
      LEGO_CHECK_VALUE(false, "rope_kv_append: dtype must be float32, bfloat16 or float16, got scalar type "
                                  << static_cast<int>(dtype));
  }
  lego::check_launch("rope_kv_append");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CUDA, m) {
  m.impl("rope_kv_append", TORCH_BOX(&rope_kv_append_cuda));
}
