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

#include "decode_layers.h"
#include "dtype.h"
#include "rows.h"
#define LEGO_OP_FILE "decode_layers.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

using lego::Layers, lego::LayerWeights, lego::Token;
static_assert(sizeof(LayerWeights) == 9 * sizeof(int64_t) && sizeof(Token) == 4 * sizeof(int64_t));

// The buffers of N tokens in the workspace.
template <class T>
struct Buffers {
  T *normed, *wide, *inner, *out;

  Buffers(const Layers& of, int64_t N) {
    normed = static_cast<T*>(of.workspace);
    wide = normed + N * of.D;
    inner = wide + N * std::max((of.Hq + 2 * of.Hkv) * of.E, 2 * of.F);
    out = inner + N * std::max(of.F, of.Hq * of.E);
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
  Chunk(const Layers& layers, const Token* tokens, int64_t N, T* h)
      : layers_(layers), tokens_(tokens), N_(N), h_(h), buffers_(layers, N) {}

  void run() {
    const int64_t Hq = layers_.Hq, Hkv = layers_.own_kv ? layers_.Hkv : 0;
    for (int64_t index = 0; index < layers_.num_layers; ++index) {
      const LayerWeights& layer = layers_.weights[index];
      norm(layer.attention_norm, Hq > 0 && index > 0);
      project_heads(layer, index, Hkv);
      if (Hq == 0) continue;
      attend(layer, index, (Hq + 2 * Hkv) * layers_.E);
      mlp(layer);
    }
    if (Hq > 0 && layers_.num_layers > 0) add_pending();
  }

 private:
  // `pending`: the output of the part before is still to be added to h.
  void norm(const void* weight, bool pending) {
    const auto kernel = LEGO_KERNEL(rms_norm_row<T>);
    for_parts(N_, layers_.D, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* h = h_ + n * layers_.D;
        kernel(pending ? buffers_.out + n * layers_.D : h, static_cast<const T*>(weight), layers_.eps,
               pending ? h : nullptr, layers_.D, buffers_.normed + n * layers_.D);
      }
    });
  }

  // Queries, rotated, and K and V to the caches: as far as the layer makes them.
  void project_heads(const LayerWeights& layer, int64_t index, int64_t Hkv) {
    const int64_t E = layers_.E, Hq = layers_.Hq, width = (Hq + 2 * Hkv) * E;
    linear(buffers_.normed, layers_.D, layer.in_proj, layer.in_bias, width, buffers_.wide);
    const auto rope = LEGO_KERNEL(rope_heads<T>);
    const auto* q_norm = static_cast<const T*>(layer.q_norm);
    const auto* k_norm = static_cast<const T*>(layer.k_norm);
    for_parts(N_, width, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const Token& token = tokens_[n];
        const float *c = layers_.cos + token.position * (E / 2), *s = layers_.sin + token.position * (E / 2);
        T *q = buffers_.wide + n * width, *k = q + Hq * E, *v = k + Hkv * E;
        rope(q, q, E, Hq, E / 2, c, s, q_norm, layers_.eps);
        if (Hkv == 0) continue;
        rope(k, at(layers_.k_cache, index, token.row, token.slot), E, Hkv, E / 2, c, s, k_norm, layers_.eps);
        std::memcpy(at(layers_.v_cache, index, token.row, token.slot), v, Hkv * E * sizeof(T));
      }
    });
  }

  // From rotated queries, `stride` apart, to the normed input of the MLP.
  void attend(const LayerWeights& layer, int64_t index, int64_t stride) {
    const int64_t E = layers_.E, Hkv = layers_.Hkv, group = layers_.Hq / Hkv, width = layers_.Hq * E;
    const auto kernel = LEGO_KERNEL(decode_attention<T>);
    int64_t longest = 1;
    for (int64_t n = 0; n < N_; ++n) longest = std::max(longest, tokens_[n].slot + 1);
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(E));
    for_parts(N_ * Hkv, 2 * longest * E, 16384, [&](int64_t begin, int64_t end) {
      lego::for_head_runs(begin, end, Hkv, [&](int64_t n, int64_t head, int64_t heads) {
        const Token& token = tokens_[n];
        kernel(buffers_.wide + n * stride + head * group * E, E, group, heads,
               at(layers_.k_cache, index, token.row, 0) + head * E, Hkv * E, E,
               at(layers_.v_cache, index, token.row, 0) + head * E, Hkv * E, E, token.slot + 1, E, scale,
               buffers_.inner + n * width + head * group * E, E);
      });
    });
    linear(buffers_.inner, width, layer.o_proj, nullptr, layers_.D, buffers_.out);
    norm(layer.mlp_norm, true);
  }

  // Leaves its output pending.
  void mlp(const LayerWeights& layer) {
    const int64_t F = layers_.F;
    linear(buffers_.normed, layers_.D, layer.gate_up, nullptr, 2 * F, buffers_.wide);
    const auto kernel = LEGO_KERNEL(swiglu_row<T>);
    for_parts(N_, F, 8192, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        kernel(buffers_.wide + n * 2 * F, F, buffers_.inner + n * F);
      }
    });
    linear(buffers_.inner, F, layer.down, nullptr, layers_.D, buffers_.out);
  }

  // The MLP's output of the last layer.
  void add_pending() {
    const auto kernel = LEGO_KERNEL(add_row<T>);
    for (int64_t n = 0; n < N_; ++n) kernel(buffers_.out + n * layers_.D, layers_.D, h_ + n * layers_.D);
  }

  T* at(void* cache, int64_t layer, int64_t row, int64_t slot) const {
    const int64_t index = (layer * layers_.B + row) * layers_.S + slot;
    return static_cast<T*>(cache) + index * layers_.Hkv * layers_.E;
  }

  // y [N, rows of w] = x [N, width] @ w^T + bias
  void linear(const T* x, int64_t width, const void* w, const void* bias, int64_t num_w, T* y) {
    const auto kernel = LEGO_KERNEL(linear_rows<T>);
    // 64 KiB of weights a thread at least: some 6 us of reading, which is what waking it costs
    const int64_t grain = std::max<int64_t>(64, (64 << 10) / (width * static_cast<int64_t>(sizeof(T))));
    torch::stable::parallel_for(0, num_w, grain, [&](int64_t begin, int64_t end) {
      kernel(x, width, N_, static_cast<const T*>(w), width, static_cast<const T*>(bias), begin, end, width, y,
             num_w);
    });
  }

  const Layers& layers_;
  const Token* tokens_;
  const int64_t N_;
  T* h_;
  const Buffers<T> buffers_;
};

template <class T>
void copy_row(const T* from, int64_t size, T* to) {
  std::memcpy(to, from, size * sizeof(T));
}

}  // namespace

void lego::run_layers(const Layers& layers, const Token* tokens, int64_t N, void* h) {
  if (N == 0) return;
  with_dtype("decode_layers", layers.dtype, [&](auto type) {
    using T = decltype(type);
    auto* rows = static_cast<T*>(h);
    const int64_t D = layers.D;
    const auto* from = static_cast<const T*>(layers.source);
    for (int64_t n = 0; n < N; ++n) copy_row(from + tokens[n].source * D, D, rows + n * D);
    Chunk<T>(layers, tokens, N, rows).run();
    if (layers.states == nullptr) return;
    auto* to = static_cast<T*>(layers.states);
    for (int64_t n = 0; n < N; ++n) {
      copy_row(rows + n * D, D, to + (tokens[n].row * layers.num_positions + tokens[n].position) * D);
    }
  });
}

namespace {

// Every token is checked before the first value is written.
void check_tokens(const Token* tokens, int64_t N, int64_t num_sources, int64_t num_rows,
                  int64_t num_positions, int64_t num_slots) {
  const auto check = [](const char* name, int64_t value, int64_t limit, int64_t n) {
    LEGO_CHECK_VALUE(0 <= value && value < limit, "decode_layers: " << name << " must be in [0, " << limit
                                                                    << "), got " << value << " in token "
                                                                    << n);
  };
  for (int64_t n = 0; n < N; ++n) {
    check("source", tokens[n].source, num_sources, n);
    check("row", tokens[n].row, num_rows, n);
    check("position", tokens[n].position, num_positions, n);
    check("slot", tokens[n].slot, num_slots, n);
  }
}

// layers int64 [L, 9], addresses; tokens int64 [N, 4]; source [M, D]; h [N, D]; states [B, P, D];
// caches [L, B, S, Hkv, E]; cos, sin float32 [P', E / 2]. The weights have the dtype of the others, and
// everything is contiguous. The workspace holds what workspace_width of lego_kernels/decoder/state.py says,
// times N.
void decode_layers_cpu(const Tensor& layers, const Tensor& tokens, const Tensor& source, Tensor h,
                       std::optional<Tensor> states, Tensor k_cache, Tensor v_cache, const Tensor& cos,
                       const Tensor& sin, int64_t num_heads, bool own_kv, int64_t hidden_dim, double eps,
                       Tensor workspace) {
  lego::Layers of;
  of.dtype = h.scalar_type();
  of.weights = static_cast<const LayerWeights*>(layers.data_ptr()), of.num_layers = layers.size(0);
  of.D = h.size(1), of.Hq = num_heads, of.Hkv = k_cache.size(3), of.E = k_cache.size(4), of.F = hidden_dim;
  of.eps = static_cast<float>(eps), of.own_kv = own_kv;
  of.source = source.data_ptr();
  of.states = states ? states->data_ptr() : nullptr, of.num_positions = states ? states->size(1) : 0;
  of.k_cache = k_cache.data_ptr(), of.v_cache = v_cache.data_ptr();
  of.B = k_cache.size(1), of.S = k_cache.size(2);
  of.cos = static_cast<const float*>(cos.data_ptr()), of.sin = static_cast<const float*>(sin.data_ptr());
  of.workspace = workspace.data_ptr();
  const auto* token = static_cast<const Token*>(tokens.data_ptr());
  const int64_t num_positions = states ? std::min(cos.size(0), states->size(1)) : cos.size(0);
  check_tokens(token, h.size(0), source.size(0), of.B, num_positions, of.S);
  lego::run_layers(of, token, h.size(0), h.data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("decode_layers", TORCH_BOX(&decode_layers_cpu)); }

#endif
