#ifdef LEGO_ISA_PASS

#include "row_attention.h"

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "dtype.h"
#include "rows.h"
#define LEGO_OP_FILE "decode_attention.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

// Returns the longest length, after a look at each.
int64_t check_lengths(const int64_t* kv_len, int64_t B, int64_t S) {
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    LEGO_CHECK_VALUE(0 <= kv_len[b] && kv_len[b] <= S, "decode_attention: kv_len must be in [0, "
                                                           << S << "], got " << kv_len[b] << " in row " << b);
    longest = std::max(longest, kv_len[b]);
  }
  return longest;
}

// q, out [B, T, Hq, E] and caches [B, S, Hkv, E] of one dtype, last strides 1; kv_len int64 [B].
// Tiles on the stack do for all scratch: the workspace is that of the CUDA kernel.
void decode_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_len,
                          double scale, Tensor out, std::optional<Tensor>) {
  const int64_t B = q.size(0), T = q.size(1), E = q.size(3), Hkv = k_cache.size(2);
  const int64_t* lengths = static_cast<const int64_t*>(kv_len.data_ptr());
  const int64_t longest = check_lengths(lengths, B, k_cache.size(1));
  if (q.numel() == 0) return;
  const int64_t group = q.size(2) / Hkv;
  lego::with_dtype("decode_attention", q.scalar_type(), [&](auto type) {
    using Value = decltype(type);
    const auto kernel = LEGO_KERNEL(decode_attention<Value>);
    // the first element of a head of a row's token or slot
    const auto at = [](const Tensor& x, int64_t b, int64_t t, int64_t h) {
      return static_cast<Value*>(x.data_ptr()) + b * x.stride(0) + t * x.stride(1) + h * x.stride(2);
    };
    // a thread reads 64 KiB of cache at least: some 6 us, which is what waking it costs
    const int64_t head_bytes = 2 * std::max<int64_t>(1, longest) * E * sizeof(Value);
    const int64_t grain = std::max<int64_t>(1, (64 << 10) / head_bytes);
    torch::stable::parallel_for(0, B * T * Hkv, grain, [&](int64_t begin, int64_t end) {
      lego::for_head_runs(begin, end, Hkv, [&](int64_t token, int64_t h, int64_t heads) {
        const int64_t b = token / T, t = token % T;
        const int64_t num_slots = std::max<int64_t>(0, lengths[b] - T + t + 1);
        kernel(at(q, b, t, h * group), q.stride(2), group, heads, at(k_cache, b, 0, h), k_cache.stride(1),
               k_cache.stride(2), at(v_cache, b, 0, h), v_cache.stride(1), v_cache.stride(2), num_slots, E,
               static_cast<float>(scale), at(out, b, t, h * group), out.stride(2));
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention_cpu));
}

#endif
