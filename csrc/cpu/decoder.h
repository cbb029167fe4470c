#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "decode_layers.h"
#include "exits.h"

namespace lego {

// Calls that a decoder made: the fields of lego_kernels/decoder/counts.py, in their order.
struct Counts {
  int64_t lower_layer_calls, upper_layer_calls, upper_kv_calls, head_calls, gate_calls, lower_passes,
      upper_passes, upper_kv_passes, head_passes, gate_passes, kv_slots;
};

struct NewToken {
  int64_t row, token, exit_layer;
  double confidence;
};

struct Draft {
  int64_t token, verified, sure;
  double confidence;
};

static_assert(sizeof(NewToken) == 32 && sizeof(Draft) == 32 && sizeof(Token) == 32);  // as Python makes them

enum class DecideBy : int64_t { max_prob, margin, entropy, gate, nothing };
enum class KVPolicy : int64_t { exact, hole, propagate, recompute };

// What a decoder is and where its sequences are, in the order of lego_kernels/decoder/state.py:
// eight bytes each. Everything is contiguous and lies in memory that Python owns.
struct DecoderState {
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int64_t num_rows, num_slots, max_chunk;
  int64_t dim, num_heads, num_kv_heads, head_dim, hidden_dim, vocab_size, num_lower, num_upper;
  int64_t upper_own_kv;
  double eps;
  DecideBy criterion;
  KVPolicy policy;
  int64_t draws, top_k;
  double top_p, top_p_temperature;
  int64_t draft_tokens;

  const void *embedding, *exit_norm, *last_norm, *head, *gate_weight, *gate_bias;
  const LayerWeights *lower, *upper, *upper_kv;
  const float *cos, *sin;

  void* states;                                 // [num_rows, num_slots, dim], the exit states
  void *lower_k, *lower_v, *upper_k, *upper_v;  // caches
  int64_t *last, *position, *upper_len;         // of each row: next input, its position, filled slots
  float *row_threshold, *row_confidence;        // of each row
  int64_t* row_seed;                            // of each row
  const float* temperature;                     // one value
  Token* tokens;                                // of the chunk, [max_chunk]
  void *h, *workspace;                          // [max_chunk, dim]; of run_layers
  float *exit_workspace, *logits, *threshold;   // of decide_exits; thresholds of the chunk
  int64_t *seed, *offset;                       // of the chunk
  int64_t* token;                               // what was decided for the chunk, as confidence, lse and exit
  float *confidence, *lse;
  bool* exit;
  int64_t *rows, *stops, *filled;  // scratch, [num_rows]
  Draft* drafts;                   // [num_rows, draft_tokens]
  NewToken* new_tokens;            // [num_rows * max(1, draft_tokens)]
  Counts* counts;
};

// The passes that decoding is made of. Each works on the first N tokens of the chunk, N <= max_chunk, and
// counts what it runs.
class Decoder {
 public:
  explicit Decoder(DecoderState& state) : s(state) {}

  // Refuses rows that have no slot for one more token.
  void check_room(const int64_t* rows, int64_t N) const;

  // Lower layers; sources are token ids. The states are in h and in `states`.
  void run_lower(int64_t N);
  // Upper layers; sources are rows of `states`, counted through.
  void run_upper(int64_t N);
  // K and V of every upper layer from exit states; no layer is run.
  void fill_upper_kv(int64_t N);

  // Score and exit of each state in h by the gate.
  void gate(int64_t N);
  // Makes the exit state of that token the first of the chunk.
  void load_state(int64_t row, int64_t position);
  // Makes a state of the chunk, with its token, the `to`-th.
  void move_state(int64_t from, int64_t to);
  // Token, confidence and exit of each state in h. False if a logit is NaN.
  bool decide(int64_t N, const void* norm, Criterion criterion);

  Token token_at(int64_t row, int64_t position) const {
    return {row * s.num_slots + position, row, position, position};
  }

  DecoderState& s;

 private:
  Layers layers(const LayerWeights* weights, int64_t num_layers) const;
  Layers upper_layers(const LayerWeights* weights) const;
  void count_slots(int64_t N, int64_t num_layers);
  int64_t state_bytes() const;
  void load_thresholds(int64_t N);
};

// Positions [upper_len, stops) of N >= 1 rows, one row after the other.
class Debt {
 public:
  Debt(const Decoder& decoder, const int64_t* rows, int64_t N);

  // Writes the next `count` tokens, at most `left`.
  void take(int64_t count, Token* to);

  int64_t left = 0;

 private:
  const Decoder& decoder_;
  const int64_t* rows_;
  int64_t next_;  // position of the next token, of the first of rows_
};

// Projects all that a debt still holds.
void settle(Decoder& decoder, Debt& debt);

}  // namespace lego
