#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "kv_append.cuh"
#include "launch.h"

namespace {

using torch::stable::Tensor;

template <typename Word>
void launch(lego::KvAppendArgs args, int64_t head_bytes, cudaStream_t stream) {
  args.words_per_head = static_cast<int>(head_bytes / sizeof(Word));
  const int warps = std::clamp((args.H * args.words_per_head + 31) / 32, 1, 8);
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.B * args.T, INT32_MAX)), 2);
  lego::kv_append_kernel<Word><<<grid, 32 * warps, 0, stream>>>(args);
}

// Contract of kv_append_cpu, except that a row whose position is out of range is not written:
// reporting it would make the host wait.
void kv_append_cuda(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v,
                    const Tensor& position) {
  if (k.numel() == 0) return;
  const lego::LaunchGuard guard(k_cache);
  const lego::KvAppendArgs args{lego::heads_of(k_cache),
                                lego::heads_of(v_cache),
                                lego::heads_of(k),
                                lego::heads_of(v),
                                static_cast<const int64_t*>(position.data_ptr()),
                                position.stride(0),
                                k.size(0),
                                k.size(1),
                                k_cache.size(1),
                                static_cast<int>(k.size(2)),
                                /*words_per_head=*/0};
  const int64_t head_bytes = k.size(3) * k.element_size();
  const cudaStream_t stream = guard.stream();
  switch (lego::kv_word_bytes(args, head_bytes)) {
    case 16:
      launch<uint4>(args, head_bytes, stream);
      break;
    case 8:
      launch<uint2>(args, head_bytes, stream);
      break;
    case 4:
      launch<uint32_t>(args, head_bytes, stream);
      break;
    default:
      launch<uint16_t>(args, head_bytes, stream);
  }
  lego::check_launch("kv_append");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CUDA, m) { m.impl("kv_append", TORCH_BOX(&kv_append_cuda)); }
