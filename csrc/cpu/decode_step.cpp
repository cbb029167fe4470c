// Decoding as lego_kernels/decoder/{decoder,speculative}.py describe it, one call a step.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../check.h"
#include "decoder.h"

namespace {

using lego::Criterion, lego::Debt, lego::DecideBy, lego::Decoder, lego::DecoderState, lego::Draft,
    lego::KVPolicy, lego::Token;
using torch::stable::Tensor;

constexpr int64_t kNaN = -1;  // returned instead of a number of new tokens

// int64 [number of fields]
DecoderState& state_of(const Tensor& state) {
  STD_TORCH_CHECK(state.numel() * sizeof(int64_t) == sizeof(DecoderState),
                  "decode_step: state must have the fields of DecoderState");
  return *static_cast<DecoderState*>(state.data_ptr());
}

const int64_t* values(const Tensor& x) { return static_cast<const int64_t*>(x.data_ptr()); }

// The criterion of the head where a token is wanted, or the gate has decided.
Criterion of_head(DecideBy criterion) {
  return criterion <= DecideBy::entropy ? static_cast<Criterion>(criterion) : Criterion::max_prob;
}

class Step : Decoder {
 public:
  explicit Step(DecoderState& state) : Decoder(state) {}

  // The lower block for these rows, and the upper block for those that stay; or either one alone. Rows go on
  // when all of it is done.
  int64_t run(const int64_t* rows, int64_t N, bool lower, bool upper) {
    check_room(rows, N);
    num_staying_ = N;
    std::copy(rows, rows + N, s.rows);
    if (lower && !run_to_exit(N)) return kNaN;
    if (upper && num_staying_ > 0 && !run_deep()) return kNaN;
    std::sort(s.new_tokens, s.new_tokens + num_new_,
              [](const auto& a, const auto& b) { return a.row < b.row; });
    for (int64_t i = 0; i < num_new_; ++i) {
      s.last[s.new_tokens[i].row] = s.new_tokens[i].token;
      s.position[s.new_tokens[i].row] += 1;
    }
    return num_new_;
  }

 private:
  // Leaves the rows that stay in s.rows.
  bool run_to_exit(int64_t N) {
    for (int64_t i = 0; i < N; ++i) {
      const int64_t row = s.rows[i], at = s.position[row];
      s.tokens[i] = {s.last[row], row, at, at};
    }
    run_lower(N);
    if (s.criterion == DecideBy::nothing) {
      for (int64_t i = 0; i < N; ++i) s.row_confidence[s.rows[i]] = std::numeric_limits<float>::quiet_NaN();
      return true;
    }
    const bool gated = s.criterion == DecideBy::gate;
    if (gated) {
      gate(N);
    } else if (!decide(N, s.exit_norm, of_head(s.criterion))) {
      return false;
    }
    int64_t num_exiting = 0;
    num_staying_ = 0;
    for (int64_t i = 0; i < N; ++i) {
      const int64_t row = s.rows[i];
      s.row_confidence[row] = s.confidence[i];
      if (!s.exit[i]) {
        s.rows[num_staying_++] = row;
      } else if (gated) {
        move_state(i, num_exiting++);
      } else {
        add_new(row, s.token[i], s.num_lower);
      }
    }
    return num_exiting == 0 || decide_tokens(num_exiting, s.exit_norm, s.num_lower);
  }

  // The upper block for the newest token of the rows in s.rows, and what they owe.
  bool run_deep() {
    const int64_t N = num_staying_;
    if (s.num_upper > 0) run_newest(N);
    if (!decide_tokens(N, s.last_norm, s.num_lower + s.num_upper)) return false;
    if (s.num_upper == 0) return true;
    for (int64_t i = 0; i < N; ++i) {
      int64_t& filled = s.upper_len[s.rows[i]];
      filled = (s.policy == KVPolicy::hole ? filled : s.position[s.rows[i]]) + 1;
    }
    return true;
  }

  // The final state of each row's newest token, to the first of the chunk.
  void run_newest(int64_t N) {
    const bool projects = s.policy == KVPolicy::exact || s.policy == KVPolicy::propagate;
    for (int64_t i = 0; i < N; ++i) {
      s.stops[s.rows[i]] = s.position[s.rows[i]] + (s.policy == KVPolicy::exact);
    }
    Debt debt(*this, s.rows, N);
    if (projects) settle(*this, debt);
    int64_t older = 0;
    if (s.policy == KVPolicy::recompute) {
      // the older states run beside the newest, and before them what does not fit there
      const int64_t room = s.max_chunk - N;
      while (debt.left > room) {
        const int64_t count = std::min(debt.left - room, s.max_chunk);
        debt.take(count, s.tokens);
        run_upper(count);
      }
      older = debt.left;
      debt.take(older, s.tokens + N);
    }
    for (int64_t i = 0; i < N; ++i) {
      s.tokens[i] = token_at(s.rows[i], s.position[s.rows[i]]);
      if (s.policy == KVPolicy::hole) s.tokens[i].slot = s.upper_len[s.rows[i]];
    }
    run_upper(N + older);
  }

  // New tokens from the first N states of the chunk.
  bool decide_tokens(int64_t N, const void* norm, int64_t exit_layer) {
    if (!decide(N, norm, of_head(s.criterion))) return false;
    for (int64_t i = 0; i < N; ++i) add_new(s.tokens[i].row, s.token[i], exit_layer);
    return true;
  }

  void add_new(int64_t row, int64_t token, int64_t exit_layer) {
    s.new_tokens[num_new_++] = {row, token, exit_layer, s.row_confidence[row]};
  }

  int64_t num_staying_ = 0, num_new_ = 0;
};

class SpeculativeStep : Decoder {
 public:
  explicit SpeculativeStep(DecoderState& state) : Decoder(state) {}

  // Drafts and verifies once in each of these rows.
  int64_t run(const int64_t* rows, int64_t N) {
    check_room(rows, N);
    for (int64_t i = 0; i < N; ++i) s.stops[rows[i]] = s.position[rows[i]];
    if (!draft(rows, N)) return kNaN;
    if (!s.upper_own_kv) {
      Debt debt(*this, rows, N);
      settle(*this, debt);
    }
    if (!verify(rows, N)) return kNaN;
    int64_t num_new = 0;
    for (int64_t i = 0; i < N; ++i) num_new = accept(rows[i], num_new);
    return num_new;
  }

 private:
  Draft& draft_at(int64_t row, int64_t position) {
    return s.drafts[row * s.draft_tokens + position - s.position[row]];
  }

  // Until every row is unsure, has its drafts or is full; stops[row] is then past its last draft.
  bool draft(const int64_t* rows, int64_t N) {
    std::copy(rows, rows + N, s.rows);
    for (int64_t round = 0; round < s.draft_tokens; ++round) {
      int64_t num_drafting = 0;
      for (int64_t i = 0; i < N; ++i) {
        const int64_t row = s.rows[i], at = s.stops[row];
        if (at == s.num_slots) continue;
        s.tokens[num_drafting] = {round > 0 ? draft_at(row, at - 1).token : s.last[row], row, at, at};
        s.rows[num_drafting++] = row;
      }
      if (num_drafting == 0) return true;
      run_lower(num_drafting);
      if (!decide_drafts(num_drafting)) return false;
      N = std::remove_if(s.rows, s.rows + num_drafting,
                         [&](int64_t row) { return !draft_at(row, s.stops[row] - 1).sure; }) -
          s.rows;
    }
    return true;
  }

  bool decide_drafts(int64_t N) {
    const bool gated = s.criterion == DecideBy::gate;
    if (gated) {
      gate(N);
      note_confidence(N);
    }
    if (!decide(N, s.exit_norm, of_head(s.criterion))) return false;
    if (!gated) note_confidence(N);
    for (int64_t n = 0; n < N; ++n) {
      draft_at(s.tokens[n].row, s.tokens[n].position).token = s.token[n];
      s.stops[s.tokens[n].row] += 1;
    }
    return true;
  }

  void note_confidence(int64_t N) {
    for (int64_t n = 0; n < N; ++n) {
      Draft& draft = draft_at(s.tokens[n].row, s.tokens[n].position);
      draft.sure = s.exit[n], draft.confidence = s.confidence[n];
    }
  }

  // The token that full depth gives after each drafted state.
  bool verify(const int64_t* rows, int64_t N) {
    int64_t count = 0;
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t at = s.position[rows[i]]; at < s.stops[rows[i]]; ++at) {
        s.tokens[count++] = token_at(rows[i], at);
        if (count == s.max_chunk && !verify_chunk(std::exchange(count, 0))) return false;
      }
    }
    return count == 0 || verify_chunk(count);
  }

  bool verify_chunk(int64_t N) {
    run_upper(N);
    if (!decide(N, s.last_norm, Criterion::max_prob)) return false;
    for (int64_t n = 0; n < N; ++n) draft_at(s.tokens[n].row, s.tokens[n].position).verified = s.token[n];
    return true;
  }

  // Goes on to the first draft that full depth replaces, or past the last.
  int64_t accept(int64_t row, int64_t num_new) {
    const Draft* draft = s.drafts + row * s.draft_tokens;
    const int64_t num_drafts = s.stops[row] - s.position[row];
    for (int64_t i = 0; i < num_drafts; ++i, ++draft) {
      s.new_tokens[num_new++] = {row, draft->verified, s.num_lower + s.num_upper, draft->confidence};
      s.last[row] = draft->verified;
      s.position[row] += 1;
      if (draft->verified != draft->token) break;
    }
    s.upper_len[row] = s.position[row];
    return num_new;
  }
};

// ids int64 [T]: all but the last run, where upper layers make their own K and V those too. The last one is
// the next input. The row starts anew.
void decode_prefill_cpu(Tensor state, int64_t row, const Tensor& ids) {
  Decoder decoder(state_of(state));
  DecoderState& s = decoder.s;
  const int64_t stop = ids.numel() - 1;
  const bool runs_upper = s.upper_own_kv && s.num_upper > 0;
  for (int64_t start = 0; start < stop; start += s.max_chunk) {
    const int64_t N = std::min(stop - start, s.max_chunk);
    for (int64_t n = 0; n < N; ++n) s.tokens[n] = {values(ids)[start + n], row, start + n, start + n};
    decoder.run_lower(N);
    if (!runs_upper) continue;
    for (int64_t n = 0; n < N; ++n) s.tokens[n] = decoder.token_at(row, start + n);
    decoder.run_upper(N);
  }
  s.position[row] = stop, s.last[row] = values(ids)[stop];
  s.upper_len[row] = runs_upper ? stop : 0;
}

// rows int64 [N], N >= 1, of the state's; the new tokens are in `new_tokens`, and their number is returned.
int64_t decode_step_cpu(Tensor state, const Tensor& rows, bool lower, bool upper) {
  return Step(state_of(state)).run(values(rows), rows.numel(), lower, upper);
}

int64_t decode_speculate_cpu(Tensor state, const Tensor& rows) {
  return SpeculativeStep(state_of(state)).run(values(rows), rows.numel());
}

// The token that an exit after the input of the row's newest token would have given; kNaN if a logit is.
int64_t decode_shallow_cpu(Tensor state, int64_t row) {
  Decoder decoder(state_of(state));
  DecoderState& s = decoder.s;
  decoder.load_state(row, s.position[row] - 1);
  return decoder.decide(1, s.exit_norm, of_head(s.criterion)) ? s.token[0] : kNaN;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) {
  m.impl("decode_prefill", TORCH_BOX(&decode_prefill_cpu));
  m.impl("decode_step", TORCH_BOX(&decode_step_cpu));
  m.impl("decode_shallow", TORCH_BOX(&decode_shallow_cpu));
  m.impl("decode_speculate", TORCH_BOX(&decode_speculate_cpu));
}
