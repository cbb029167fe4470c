#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace lego {

// One row of the table of addresses, in the order of FIELDS in lego_kernels/decoder/decode_layers.py. Null
// where a layer has no such weight.
struct LayerWeights {
  const void *attention_norm, *in_proj, *in_bias, *q_norm, *k_norm, *o_proj, *mlp_norm, *gate_up, *down;
};

// One token of a chunk.
struct Token {
  int64_t source;    // row of `source` that its state starts from
  int64_t row;       // of the caches
  int64_t position;  // for the rotary angles
  int64_t slot;      // its place in the caches; it attends to all up to it
};

// A range of layers over caches of its own. Everything is contiguous.
struct Layers {
  torch::headeronly::ScalarType dtype;
  const LayerWeights* weights;
  int64_t num_layers;
  int64_t D, Hq, Hkv, E, F;
  float eps;
  bool own_kv;
  const void* source;       // [M, D]
  void* states;             // [B, num_positions, D], or null
  int64_t num_positions;    // of a row in states
  void *k_cache, *v_cache;  // [L, B, S, Hkv, E]
  int64_t B, S;
  const float *cos, *sin;  // [positions, E / 2]
  void* workspace;
};

// For each token n: h[n] = source[tokens[n].source], then all layers; the result goes to
// states[row, position] too, if there are states. Token n appends its K and V to the caches and attends
// to the slots up to its own; a token may see others of its chunk.
// Hq = 0: K and V of the states are appended, layer by layer, and that is all; h stays.
// own_kv = false: the layers make queries alone, and find K and V in the caches.
void run_layers(const Layers& layers, const Token* tokens, int64_t N, void* h);

}  // namespace lego
