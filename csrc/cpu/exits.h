#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "rows.h"

namespace lego {

enum class Criterion { max_prob, margin, entropy };

// Where the results go, each [B].
struct ExitResults {
  int64_t* token;
  float *confidence, *lse;
  bool* exit;
};

// One exit decision. The noise is that of lego_kernels/gumbel.py.
struct ExitRequest {
  torch::headeronly::ScalarType dtype;
  const void *h, *head, *norm_weight;  // [B, D]; [V, D]; [D], or null: h is normed
  int64_t h_stride, head_stride;
  int64_t B, D, V;
  float eps;
  Criterion criterion;
  PerRow<float> threshold;
  PerRow<float> temperature;  // without data: nothing is drawn
  PerRow<int64_t> seed, offset;
  // tokens outside these are not drawn, as lego_kernels/decoder/sampling.py says; 0 and 1 keep all
  int64_t top_k = 0;
  double top_p = 1, top_p_temperature = 1;  // of the probabilities that reach top_p
  float* logits = nullptr;                  // with top_k or top_p: [B, V rounded up to a tile]
  float* workspace;                         // as large as exit_decision_workspace makes it
};
void decide_exits(const ExitRequest& in, const ExitResults& out);

// The rows of the head whose logits are reduced at once. Whatever B is and however many threads there
// are, the tiles are the same, and so are the bits of a row.
constexpr int64_t kTile = 128;

// The learned gate of B states, `h_stride` apart, on norm(h), or on h if norm_weight is null.
struct GateRequest {
  torch::headeronly::ScalarType dtype;
  const void *h, *weight, *norm_weight, *bias;
  torch::headeronly::ScalarType bias_dtype;
  int64_t h_stride, B, D;
  float eps;
  PerRow<float> threshold;
};
void gate_exits(const GateRequest& in, float* score, bool* exit);

}  // namespace lego
