#ifdef LEGO_ISA_PASS

#include "row_rope.h"

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "dtype.h"
#include "rows.h"
#define LEGO_OP_FILE "rope_kv_append.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;
using PerRow = lego::PerRow<int64_t>;

// A [B, T or S, H, E] tensor, or packed QKV [B, T, H * E]; strides in elements.
template <class T>
struct Heads {
  T* data;
  int64_t row, token, head;

  Heads(const Tensor& x, int64_t E)
      : data(static_cast<T*>(x.data_ptr())),
        row(x.stride(0)),
        token(x.stride(1)),
        head(x.dim() == 4 ? x.stride(2) : E) {}

  T* at(int64_t b, int64_t t) const { return data + b * row + t * token; }
};

// Every row is checked before the first value is written.
void check_rows(const PerRow& position, const PerRow& slot, int64_t B, int64_t last_position,
                int64_t last_slot) {
  for (int64_t b = 0; b < B; ++b) {
    LEGO_CHECK_VALUE(position[b] >= 0 && position[b] <= last_position,
                     "rope_kv_append: position must be in [0, P - T = " << last_position << "], got "
                                                                        << position[b] << " in row " << b);
  }
  for (int64_t b = 0; b < B; ++b) {
    LEGO_CHECK_VALUE(slot[b] <= last_slot, "rope_kv_append: slot must be at most S - T = "
                                               << last_slot << ", got " << slot[b] << " in row " << b);
  }
}

template <class T>
void copy_heads(const T* from, T* to, int64_t to_stride, int64_t num_heads, int64_t E) {
  if (to_stride == E) {
    std::memcpy(to, from, num_heads * E * sizeof(T));
    return;
  }
  for (int64_t h = 0; h < num_heads; ++h) std::memcpy(to + h * to_stride, from + h * E, E * sizeof(T));
}

// q_out [B, T, Hq, E], caches [B, S, Hkv, E], qkv [B, T, (Hq + 2 * Hkv) * E] and norms [E] of one
// dtype; cos, sin float32 [P, E / 2]; position, slot int64 [B]. A negative slot appends nothing.
void rope_kv_append_cpu(Tensor q_out, Tensor k_cache, Tensor v_cache, const Tensor& qkv, const Tensor& cos,
                        const Tensor& sin, const Tensor& position, const Tensor& slot,
                        std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, double eps) {
  const int64_t B = q_out.size(0), T = q_out.size(1), Hq = q_out.size(2), E = q_out.size(3);
  const int64_t Hkv = k_cache.size(2);
  const PerRow positions(position), slots(slot);
  check_rows(positions, slots, B, cos.size(0) - T, k_cache.size(1) - T);
  const auto* cos_data = static_cast<const float*>(cos.data_ptr());
  const auto* sin_data = static_cast<const float*>(sin.data_ptr());
  const int64_t cos_stride = cos.stride(0), sin_stride = sin.stride(0);
  lego::with_dtype("rope_kv_append", q_out.scalar_type(), [&](auto type) {
    using Value = decltype(type);
    const auto rope = LEGO_KERNEL(rope_heads<Value>);
    const Heads<Value> to_q(q_out, E), to_k(k_cache, E), to_v(v_cache, E), from(qkv, E);
    const auto* q_weight = q_norm ? static_cast<const Value*>(q_norm->data_ptr()) : nullptr;
    const auto* k_weight = k_norm ? static_cast<const Value*>(k_norm->data_ptr()) : nullptr;
    // a thread gets 16,384 values at least: some 5 us, which is what waking it costs
    const int64_t grain = std::max<int64_t>(1, 16384 / ((Hq + 2 * Hkv) * E));
    torch::stable::parallel_for(0, B * T, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / T, t = i % T, place = slots[b] + t;
        const float* c = cos_data + (positions[b] + t) * cos_stride;
        const float* s = sin_data + (positions[b] + t) * sin_stride;
        const auto* q = from.at(b, t);
        const auto *k = q + Hq * E, *v = k + Hkv * E;
        const auto epsilon = static_cast<float>(eps);
        rope(q, to_q.at(b, t), to_q.head, Hq, E / 2, c, s, q_weight, epsilon);
        if (slots[b] < 0) continue;
        rope(k, to_k.at(b, place), to_k.head, Hkv, E / 2, c, s, k_weight, epsilon);
        copy_heads(v, to_v.at(b, place), to_v.head, Hkv, E);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("rope_kv_append", TORCH_BOX(&rope_kv_append_cpu)); }

#endif
