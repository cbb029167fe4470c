#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../check.h"
#include "rows.h"

namespace {

using torch::stable::Tensor;

// A [B, T or S, H, D] tensor as bytes. The D elements of a head lie together; the other strides
// are free, so that caches and views of packed QKV are used where they lie.
struct Heads {
  char* data;
  int64_t row, token, head;  // strides in bytes

  explicit Heads(const Tensor& x) : data(static_cast<char*>(x.data_ptr())) {
    const int64_t element = x.element_size();
    row = x.stride(0) * element;
    token = x.stride(1) * element;
    head = x.stride(2) * element;
  }

  char* at(int64_t b, int64_t t) const { return data + b * row + t * token; }
};

// k, v [B, T, H, D]; caches [B, S, H, D]; position int64 [B]. Token t of row b lands in slot
// position[b] + t; a negative position skips the row. Every position is checked before the first
// byte is written, so a bad one leaves the caches as they were.
void kv_append_cpu(Tensor k_cache, Tensor v_cache, const Tensor& k, const Tensor& v, const Tensor& position) {
  const int64_t B = k.size(0), T = k.size(1), H = k.size(2), S = k_cache.size(1);
  const int64_t head_bytes = k.size(3) * k.element_size();
  const lego::PerRow<int64_t> first_slot(position);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t slot = first_slot[b];
    LEGO_CHECK_VALUE(slot <= S - T, "kv_append: position must be at most S - T = "
                                        << S - T << ", got " << slot << " in row " << b);
  }

  const Heads to_k(k_cache), to_v(v_cache), from_k(k), from_v(v);
  const auto copy = [&](const Heads& to, const Heads& from, int64_t b, int64_t t, int64_t slot) {
    char* target = to.at(b, slot);
    const char* source = from.at(b, t);
    if (to.head == head_bytes && from.head == head_bytes) {
      std::memcpy(target, source, H * head_bytes);
      return;
    }
    for (int64_t h = 0; h < H; ++h) std::memcpy(target + h * to.head, source + h * from.head, head_bytes);
  };

  // a thread gets 64 KiB of k at least: some 6 us of copying, which is what waking it costs
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, H * head_bytes));
  torch::stable::parallel_for(0, B * T, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / T, t = i % T, slot = first_slot[b];
      if (slot < 0) continue;
      copy(to_k, from_k, b, t, slot + t);
      copy(to_v, from_v, b, t, slot + t);
    }
  });
}

}  // namespace

// the schema is defined once, in Python; C++ only adds a kernel for its device
STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("kv_append", TORCH_BOX(&kv_append_cpu)); }
