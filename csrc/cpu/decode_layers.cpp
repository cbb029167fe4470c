#ifdef LEGO_ISA_PASS

#include "row_attention.h"
#include "row_linear.h"
#include "row_rms_norm.h"
#include "row_rope.h"
#include "row_swiglu.h"

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "dtype.h"
#include "rows.h"
#define LEGO_OP_FILE "decode_layers.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

// One row of the table of addresses, in the order of FIELDS in lego_kernels/decoder/decode_layers.py. Null
// where a layer has no such weight.
struct LayerWeights {
  const void *attention_norm, *in_proj, *in_bias, *q_norm, *k_norm, *o_proj, *mlp_norm, *gate_up, *down;
};
static_assert(sizeof(LayerWeights) == 9 * sizeof(int64_t));

// One row of `tokens`.
struct Token {
  int64_t source;    // row of `source` that its state starts from
  int64_t row;       // of the caches
  int64_t position;  // for the rotary angles
  int64_t slot;      // its place in the caches; it attends to all up to it
};

struct Shape {
  int64_t N, D, S, Hq, Hkv, E, F;
  float eps;
};

// The buffers of N tokens in the workspace.
template <class T>
struct Buffers {
  T *normed, *wide, *inner, *out;

  Buffers(void* workspace, const Shape& shape) {
    const int64_t heads = (shape.Hq + 2 * shape.Hkv) * shape.E;
    normed = static_cast<T*>(workspace);
    wide = normed + shape.N * shape.D;
    inner = wide + shape.N * std::max(heads, 2 * shape.F);
    out = inner + shape.N * std::max(shape.F, shape.Hq * shape.E);
  }
};

// Calls run(begin, end) for parts of [0, size), on several threads where each gets `least` values, of
// which one item has `width`: less is not worth waking a thread for.
template <class Run>
void for_parts(int64_t size, int64_t width, int64_t least, const Run& run) {
  torch::stable::parallel_for(0, size, std::max<int64_t>(1, least / std::max<int64_t>(1, width)), run);
}

// The tokens of a call on their way through layers. Every method reads and writes whole rows by the
// kernels that the ops of those names run, so the bits are those of the ops one after the other.
template <class T>
class Chunk {
 public:
  Chunk(const Shape& shape, const Token* tokens, T* h, const Tensor& k_cache, const Tensor& v_cache,
        const Tensor& cos, const Tensor& sin, void* workspace)
      : shape_(shape),
        tokens_(tokens),
        h_(h),
        k_cache_(k_cache),
        v_cache_(v_cache),
        cos_(static_cast<const float*>(cos.data_ptr())),
        sin_(static_cast<const float*>(sin.data_ptr())),
        buffers_(workspace, shape) {}

  void run(const LayerWeights* layers, int64_t num_layers, bool own_kv) {
    const int64_t Hq = shape_.Hq, Hkv = own_kv ? shape_.Hkv : 0;
    for (int64_t index = 0; index < num_layers; ++index) {
      const LayerWeights& layer = layers[index];
      norm(layer.attention_norm, Hq > 0 && index > 0);
      project_heads(layer, index, Hkv);
      if (Hq == 0) continue;
      attend(layer, index, (Hq + 2 * Hkv) * shape_.E);
      mlp(layer);
    }
    if (Hq > 0 && num_layers > 0) add_pending();
  }

 private:
  // `pending`: the output of the part before is still to be added to h.
  void norm(const void* weight, bool pending) {
    const auto kernel = LEGO_KERNEL(rms_norm_row<T>);
    for_parts(shape_.N, shape_.D, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* h = h_ + n * shape_.D;
        kernel(pending ? buffers_.out + n * shape_.D : h, static_cast<const T*>(weight), shape_.eps,
               pending ? h : nullptr, shape_.D, buffers_.normed + n * shape_.D);
      }
    });
  }

  // Queries, rotated, and K and V to the caches: as far as the layer makes them.
  void project_heads(const LayerWeights& layer, int64_t index, int64_t Hkv) {
    const int64_t E = shape_.E, Hq = shape_.Hq, width = (Hq + 2 * Hkv) * E;
    linear(buffers_.normed, shape_.D, layer.in_proj, layer.in_bias, width, buffers_.wide);
    const auto rope = LEGO_KERNEL(rope_heads<T>);
    const auto* q_norm = static_cast<const T*>(layer.q_norm);
    const auto* k_norm = static_cast<const T*>(layer.k_norm);
    for_parts(shape_.N, width, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Token& token = tokens_[n];
        const float *c = cos_ + token.position * (E / 2), *s = sin_ + token.position * (E / 2);
        T *q = buffers_.wide + n * width, *k = q + Hq * E, *v = k + Hkv * E;
        rope(q, q, E, Hq, E / 2, c, s, q_norm, shape_.eps);
        if (Hkv == 0) continue;
        rope(k, at(k_cache_, index, token.row, token.slot), E, Hkv, E / 2, c, s, k_norm, shape_.eps);
        std::memcpy(at(v_cache_, index, token.row, token.slot), v, Hkv * E * sizeof(T));
      }
    });
  }

  // From rotated queries, `stride` apart, to the normed input of the MLP.
  void attend(const LayerWeights& layer, int64_t index, int64_t stride) {
    const int64_t E = shape_.E, Hkv = shape_.Hkv, group = shape_.Hq / Hkv, width = shape_.Hq * E;
    const auto kernel = LEGO_KERNEL(decode_attention<T>);
    int64_t longest = 1;
    for (int64_t n = 0; n < shape_.N; ++n) longest = std::max(longest, tokens_[n].slot + 1);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(E));
    for_parts(shape_.N * Hkv, 2 * longest * E, 16384, [&](int64_t begin, int64_t end) {
      lego::for_head_runs(begin, end, Hkv, [&](int64_t n, int64_t head, int64_t heads) {
        const Token& token = tokens_[n];
        kernel(buffers_.wide + n * stride + head * group * E, E, group, heads,
               at(k_cache_, index, token.row, 0) + head * E, Hkv * E, E,
               at(v_cache_, index, token.row, 0) + head * E, Hkv * E, E, token.slot + 1, E, scale,
               buffers_.inner + n * width + head * group * E, E);
      });
    });
    linear(buffers_.inner, width, layer.o_proj, nullptr, shape_.D, buffers_.out);
    norm(layer.mlp_norm, true);
  }

  // Leaves its output pending.
  void mlp(const LayerWeights& layer) {
    const int64_t F = shape_.F;
    linear(buffers_.normed, shape_.D, layer.gate_up, nullptr, 2 * F, buffers_.wide);
    const auto kernel = LEGO_KERNEL(swiglu_row<T>);
    for_parts(shape_.N, F, 8192, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        kernel(buffers_.wide + n * 2 * F, F, buffers_.inner + n * F);
      }
    });
    linear(buffers_.inner, F, layer.down, nullptr, shape_.D, buffers_.out);
  }

  // The MLP's output of the last layer.
  void add_pending() {
    const auto kernel = LEGO_KERNEL(add_row<T>);
    for (int64_t n = 0; n < shape_.N; ++n) kernel(buffers_.out + n * shape_.D, shape_.D, h_ + n * shape_.D);
  }

  static T* at(const Tensor& cache, int64_t layer, int64_t row, int64_t slot) {
    return static_cast<T*>(cache.data_ptr()) + layer * cache.stride(0) + row * cache.stride(1) +
           slot * cache.stride(2);
  }

  // y [N, rows of w] = x [N, width] @ w^T + bias
  void linear(const T* x, int64_t width, const void* w, const void* bias, int64_t num_w, T* y) {
    const auto kernel = LEGO_KERNEL(linear_rows<T>);
    // 64 KiB of weights a thread at least: some 6 us of reading, which is what waking it costs
    const int64_t grain = std::max<int64_t>(64, (64 << 10) / (width * static_cast<int64_t>(sizeof(T))));
    torch::stable::parallel_for(0, num_w, grain, [&](int64_t begin, int64_t end) {
      kernel(x, width, shape_.N, static_cast<const T*>(w), width, static_cast<const T*>(bias), begin, end,
             width, y, num_w);
    });
  }

  const Shape shape_;
  const Token* tokens_;
  T* h_;
  const Tensor &k_cache_, &v_cache_;
  const float *cos_, *sin_;
  const Buffers<T> buffers_;
};

template <class T>
void copy_row(const T* from, int64_t size, T* to) {
  std::memcpy(to, from, size * sizeof(T));
}

// Every token is checked before the first value is written.
void check_tokens(const Token* tokens, const Shape& shape, int64_t num_sources, int64_t num_rows,
                  int64_t num_positions) {
  const auto check = [](const char* name, int64_t value, int64_t limit, int64_t n) {
    LEGO_CHECK_VALUE(0 <= value && value < limit, "decode_layers: " << name << " must be in [0, " << limit
                                                                    << "), got " << value << " in token "
                                                                    << n);
  };
  for (int64_t n = 0; n < shape.N; ++n) {
    check("source", tokens[n].source, num_sources, n);
    check("row", tokens[n].row, num_rows, n);
    check("position", tokens[n].position, num_positions, n);
    check("slot", tokens[n].slot, shape.S, n);
  }
}

// For each token n of the chunk: h[n] = source[tokens[n].source], then all L layers; the result goes to
// states[row, position] too, if there are states. Token n appends its K and V to the caches and attends
// to the slots up to its own; a token may see others of its chunk.
// num_heads = 0: K and V of the states are appended, layer by layer, and that is all; h stays.
// own_kv = false: the layers make queries alone, and find K and V in the caches.
//
// layers int64 [L, 9], addresses; tokens int64 [N, 4]; source [M, D]; h [N, D]; states [B, P, D];
// caches [L, B, S, Hkv, E]; cos, sin float32 [P', E / 2]. The weights have the dtype of the others, and
// everything is contiguous. The workspace has the size that lego_kernels/decoder/layers.py computes.
void decode_layers_cpu(const Tensor& layers, const Tensor& tokens, const Tensor& source, Tensor h,
                       std::optional<Tensor> states, Tensor k_cache, Tensor v_cache, const Tensor& cos,
                       const Tensor& sin, int64_t num_heads, bool own_kv, int64_t hidden_dim, double eps,
                       Tensor workspace) {
  const Shape shape = {h.size(0),       h.size(1),       k_cache.size(2), num_heads,
                       k_cache.size(3), k_cache.size(4), hidden_dim,      static_cast<float>(eps)};
  const auto* token = static_cast<const Token*>(tokens.data_ptr());
  const int64_t num_positions = states ? std::min(cos.size(0), states->size(1)) : cos.size(0);
  check_tokens(token, shape, source.size(0), k_cache.size(1), num_positions);
  if (shape.N == 0) return;
  lego::with_dtype("decode_layers", h.scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* rows = static_cast<T*>(h.data_ptr());
    const auto* from = static_cast<const T*>(source.data_ptr());
    const int64_t D = shape.D;
    for (int64_t n = 0; n < shape.N; ++n) copy_row(from + token[n].source * D, D, rows + n * D);
    Chunk<T> chunk(shape, token, rows, k_cache, v_cache, cos, sin, workspace.data_ptr());
    const auto* table = static_cast<const LayerWeights*>(layers.data_ptr());
    chunk.run(table, layers.size(0), own_kv);
    if (!states) return;
    auto* to = static_cast<T*>(states->data_ptr());
    const int64_t P = states->size(1);
    for (int64_t n = 0; n < shape.N; ++n) {
      copy_row(rows + n * D, D, to + (token[n].row * P + token[n].position) * D);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("decode_layers", TORCH_BOX(&decode_layers_cpu)); }

#endif
