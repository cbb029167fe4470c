#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../check.h"

namespace lego {

using torch::headeronly::ScalarType;

namespace {

ScalarType dtype_of(const DecoderState& s) {
  constexpr ScalarType dtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  return dtypes[s.dtype];
}

// One value for each of the chunk's tokens.
template <class V>
PerRow<V> each(const V* data) {
  PerRow<V> values;
  values.data = data, values.stride = 1;
  return values;
}

}  // namespace

void Decoder::check_room(const int64_t* rows, int64_t N) const {
  for (int64_t i = 0; i < N; ++i) {
    LEGO_CHECK_VALUE(s.position[rows[i]] < s.num_slots,
                     "Decoder: row " << rows[i] << " must hold less than num_slots=" << s.num_slots
                                     << " tokens, got " << s.position[rows[i]]);
  }
}

Layers Decoder::layers(const LayerWeights* weights, int64_t num_layers) const {
  Layers of;
  of.dtype = dtype_of(s);
  of.weights = weights, of.num_layers = num_layers;
  of.D = s.dim, of.Hq = s.num_heads, of.Hkv = s.num_kv_heads, of.E = s.head_dim, of.F = s.hidden_dim;
  of.eps = static_cast<float>(s.eps);
  of.num_positions = of.S = s.num_slots, of.B = s.num_rows;
  of.cos = s.cos, of.sin = s.sin;
  of.workspace = s.workspace;
  return of;
}

void Decoder::run_lower(int64_t N) {
  Layers of = layers(s.lower, s.num_lower);
  of.own_kv = true;
  of.source = s.embedding, of.states = s.states;
  of.k_cache = s.lower_k, of.v_cache = s.lower_v;
  run_layers(of, s.tokens, N, s.h);
  s.counts->lower_layer_calls += s.num_lower * N;
  s.counts->lower_passes += s.num_lower;
  count_slots(N, s.num_lower);
}

Layers Decoder::upper_layers(const LayerWeights* weights) const {
  Layers of = layers(weights, s.num_upper);
  of.source = s.states, of.states = nullptr;
  of.k_cache = s.upper_k, of.v_cache = s.upper_v;
  return of;
}

void Decoder::run_upper(int64_t N) {
  Layers of = upper_layers(s.upper);
  of.own_kv = s.upper_own_kv;
  run_layers(of, s.tokens, N, s.h);
  s.counts->upper_layer_calls += s.num_upper * N;
  s.counts->upper_passes += s.num_upper;
  count_slots(N, s.num_upper);
}

void Decoder::fill_upper_kv(int64_t N) {
  Layers of = upper_layers(s.upper_kv);
  of.own_kv = true, of.Hq = 0;
  run_layers(of, s.tokens, N, s.h);
  s.counts->upper_kv_calls += N;
  s.counts->upper_kv_passes += 1;
}

// Cache slots that the chunk's rows hold, each read once a layer.
void Decoder::count_slots(int64_t N, int64_t num_layers) {
  for (int64_t n = 0; n < N; ++n) s.filled[s.tokens[n].row] = 0;
  int64_t slots = 0;
  for (int64_t n = 0; n < N; ++n) {
    int64_t& filled = s.filled[s.tokens[n].row];
    const int64_t more = std::max<int64_t>(0, s.tokens[n].slot + 1 - filled);
    filled += more, slots += more;
  }
  s.counts->kv_slots += num_layers * slots;
}

void Decoder::load_thresholds(int64_t N) {
  for (int64_t n = 0; n < N; ++n) s.threshold[n] = s.row_threshold[s.tokens[n].row];
}

void Decoder::gate(int64_t N) {
  load_thresholds(N);
  GateRequest in;
  in.dtype = dtype_of(s);
  in.h = s.h, in.weight = s.gate_weight, in.norm_weight = s.exit_norm;
  in.h_stride = in.D = s.dim, in.B = N;
  in.bias = s.gate_bias, in.bias_dtype = in.dtype;
  in.eps = static_cast<float>(s.eps);
  in.threshold = each(s.threshold);
  gate_exits(in, s.confidence, s.exit);
  s.counts->gate_calls += N;
  s.counts->gate_passes += 1;
}

int64_t Decoder::state_bytes() const { return s.dim * (s.dtype == 0 ? 4 : 2); }

void Decoder::load_state(int64_t row, int64_t position) {
  s.tokens[0] = token_at(row, position);
  std::memcpy(s.h, static_cast<const char*>(s.states) + s.tokens[0].source * state_bytes(), state_bytes());
}

void Decoder::move_state(int64_t from, int64_t to) {
  const int64_t bytes = state_bytes();
  auto* h = static_cast<char*>(s.h);
  if (from != to) std::memcpy(h + to * bytes, h + from * bytes, bytes);
  s.tokens[to] = s.tokens[from];
}

bool Decoder::decide(int64_t N, const void* norm, Criterion criterion) {
  load_thresholds(N);
  ExitRequest in;
  in.dtype = dtype_of(s);
  in.h = s.h, in.head = s.head, in.norm_weight = norm;
  in.h_stride = in.head_stride = in.D = s.dim, in.B = N, in.V = s.vocab_size;
  in.eps = static_cast<float>(s.eps);
  in.criterion = criterion;
  in.threshold = each(s.threshold);
  if (s.draws) {
    for (int64_t n = 0; n < N; ++n) {
      s.seed[n] = s.row_seed[s.tokens[n].row];
      s.offset[n] = s.tokens[n].position + 1;
    }
    in.temperature.data = s.temperature;  // the same for all
    in.seed = each(s.seed), in.offset = each(s.offset);
  }
  in.top_k = s.top_k, in.top_p = s.top_p, in.top_p_temperature = s.top_p_temperature;
  in.logits = s.logits;
  in.workspace = s.exit_workspace;
  decide_exits(in, {s.token, s.confidence, s.lse, s.exit});
  s.counts->head_calls += N;
  s.counts->head_passes += 1;
  return std::none_of(s.lse, s.lse + N, [](float lse) { return std::isnan(lse); });
}

Debt::Debt(const Decoder& decoder, const int64_t* rows, int64_t N)
    : decoder_(decoder), rows_(rows), next_(decoder.s.upper_len[rows[0]]) {
  for (int64_t i = 0; i < N; ++i) left += decoder.s.stops[rows[i]] - decoder.s.upper_len[rows[i]];
}

void Debt::take(int64_t count, Token* to) {
  left -= count;
  while (count > 0) {
    if (next_ < decoder_.s.stops[*rows_]) {
      *to++ = decoder_.token_at(*rows_, next_++);
      --count;
    } else {
      next_ = decoder_.s.upper_len[*++rows_];
    }
  }
}

void settle(Decoder& decoder, Debt& debt) {
  while (debt.left > 0) {
    const int64_t count = std::min(debt.left, decoder.s.max_chunk);
    debt.take(count, decoder.s.tokens);
    decoder.fill_upper_kv(count);
  }
}

}  // namespace lego
