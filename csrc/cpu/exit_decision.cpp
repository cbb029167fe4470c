#ifdef LEGO_ISA_PASS

#include "row_gumbel.h"

// the first `count` values, -inf in the other lanes
inline Vec load_logits(const float* from, int64_t count) {
  return where(lane_numbers() < static_cast<int32_t>(count), load_first(from, count),
               splat(-__builtin_inff()));
}

// The largest of some values, the lowest index that has it, and the second largest.
struct Top {
  float value;
  int32_t index;
  float second;
};

template <int distance, class V, size_t... lane>
inline V swap_lanes(V x, std::index_sequence<lane...>) {
  return __builtin_shufflevector(x, x, (lane ^ distance)...);
}

// The top of each lane becomes that of all lanes.
template <int distance = kLanes / 2>
inline void merge_lanes(Vec& value, IntVec& index, Vec& second) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  const Vec other = swap_lanes<distance>(value, lanes);
  const IntVec other_index = swap_lanes<distance>(index, lanes);
  second = max(max(second, swap_lanes<distance>(second, lanes)), min(value, other));
  const IntVec better = (other > value) | ((other == value) & (other_index < index));
  value = where(better, other, value);
  index = better ? other_index : index;
  if constexpr (distance > 1) merge_lanes<distance / 2>(value, index, second);
}

// The top of x[0, size), size > 0. A NaN among them makes the values void, not the index.
inline Top top_of(const float* x, int64_t size) {
  Vec value = splat(-__builtin_inff()), second = value;
  IntVec index = lane_numbers();
  const auto take = [&](int64_t i, Vec more) __attribute__((always_inline)) {
    const IntVec above = more > value;
    second = max(second, min(more, value));
    value = where(above, more, value);
    index = above ? lane_numbers() + static_cast<int32_t>(i) : index;
  };
  for_each_vec(
      size, [&](int64_t i) __attribute__((always_inline)) { take(i, load(x + i)); },
      [&](int64_t i, int64_t rest) __attribute__((always_inline)) { take(i, load_logits(x + i, rest)); });
  merge_lanes(value, index, second);
  return {value[0], index[0], second[0]};
}

inline int32_t first_nan(const float* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (x[i] != x[i]) return static_cast<int32_t>(i);
  }
  return -1;
}

// Sums over logits of e^d and of e^d * d, where d is a logit less a base: the largest, or 0 if that
// is -inf. So logits of -inf add nothing, and a NaN or +inf makes a NaN.
struct Sums {
  Vec plain = {}, weighted = {};

  // Adds logits whose sums are `plain_of` and `weighted_of`, with `most` for a base.
  void add(Vec most, Vec plain_of, Vec weighted_of, float base) {
    const Vec d = most - base, e = exp(d);
    plain += e * plain_of;
    // e is 0 from -88 down: with -1000 for -inf the product is 0 too
    weighted += e * (weighted_of + plain_of * max(d, splat(-1000.0f)));
  }
};

inline float base_of(float most) { return most == -__builtin_inff() ? 0 : most; }

// The top of the logits of a tile with noise.
inline Top draw_tile(const lego::ExitInputs& in, int64_t row, int64_t tile, const float* logits) {
  float score[lego::kTile];
  perturb(logits, in.temperature[row], static_cast<uint64_t>(in.seed[row]),
          static_cast<uint64_t>(in.offset[row]), tile * lego::kTile, score);
  return top_of(score, lego::kTile);
}

// Draws from the logits of a row that were kept, without a NaN among them, instead of from all.
inline void draw_kept(const lego::ExitInputs& in, const lego::ExitPartials& to, int64_t row) {
  for (int64_t i = row * in.num_tiles; i < (row + 1) * in.num_tiles; ++i) {
    const Top drawn = draw_tile(in, row, i - row * in.num_tiles, in.logits + i * lego::kTile);
    to.score[i] = drawn.value;
    to.index[i] = drawn.index;
  }
}

// The partials of one row from the logits of a tile, where those past the vocabulary are -inf.
inline void reduce_tile(const lego::ExitInputs& in, const lego::ExitPartials& to, int64_t row, int64_t tile,
                        const float* logits) {
  Top top = top_of(logits, lego::kTile);
  Sums sums;
  for (int64_t i = 0; i < lego::kTile; i += kLanes) {
    sums.add(load(logits + i), splat(1), Vec{}, base_of(top.value));
  }
  const float plain = sum(sums.plain);
  // at temperature 0 the noise has no weight; where logits are kept, draw_kept draws
  const bool noisy = in.logits == nullptr && in.temperature.data != nullptr && in.temperature[row] > 0;
  Top drawn = noisy ? draw_tile(in, row, tile, logits) : top;
  const int32_t nan = plain != plain ? first_nan(logits, lego::kTile) : -1;
  if (nan >= 0) top.value = top.second = drawn.value = plain, drawn.index = nan;
  const int64_t i = row * in.num_tiles + tile;
  if (in.logits != nullptr) std::memcpy(in.logits + i * lego::kTile, logits, lego::kTile * sizeof(float));
  to.most[i] = top.value;
  to.second[i] = top.second;
  to.sum[i] = plain;
  to.weighted[i] = sum(sums.weighted);
  to.score[i] = drawn.value;
  to.index[i] = drawn.index;
}

// The partials of every row and of the tiles [begin, end). h is normed.
template <class T>
void exit_tiles(const lego::ExitInputs& in, const lego::ExitPartials& to, int64_t begin, int64_t end) {
  const Blocks blocks = blocks_of<T>(in.B, in.D);
  const auto* h = static_cast<const T*>(in.h);
  const auto* head = static_cast<const T*>(in.head);
  float logits[kBlockSums];
  const int64_t stop = end * lego::kTile < in.V ? end * lego::kTile : in.V;
  for (int64_t first = begin * lego::kTile; first < stop; first += blocks.num_sums) {
    const int64_t count = stop - first < blocks.num_sums ? stop - first : blocks.num_sums;
    for (int64_t row = 0; row < in.B; row += blocks.num_x) {
      const int64_t num_rows = in.B - row < blocks.num_x ? in.B - row : blocks.num_x;
      for (int64_t n = 0; n < count; n += blocks.num_w) {
        dot_products(h + row * in.h_stride, in.h_stride, num_rows, head + (first + n) * in.head_stride,
                     in.head_stride, count - n < blocks.num_w ? count - n : blocks.num_w, in.D, logits + n,
                     blocks.num_sums);
      }
      for (int64_t r = 0; r < num_rows; ++r) {
        for (int64_t n = 0; n < count; n += lego::kTile) {
          float* x = logits + r * blocks.num_sums + n;
          for (int64_t i = count - n; i < lego::kTile; ++i) x[i] = -__builtin_inff();
          reduce_tile(in, to, row + r, (first + n) / lego::kTile, x);
        }
      }
    }
  }
}

// What the partials of a row come to.
inline lego::ExitSummary merge_tiles(const lego::ExitPartials& of, int64_t row, int64_t num_tiles) {
  const int64_t from = row * num_tiles;
  const Top top = top_of(of.most + from, num_tiles), second = top_of(of.second + from, num_tiles);
  Sums sums;
  for_each_vec(
      num_tiles,
      [&](int64_t i) {
        sums.add(load(of.most + from + i), load(of.sum + from + i), load(of.weighted + from + i),
                 base_of(top.value));
      },
      [&](int64_t i, int64_t rest) {
        sums.add(load_logits(of.most + from + i, rest), load_first(of.sum + from + i, rest),
                 load_first(of.weighted + from + i, rest), base_of(top.value));
      });
  const float plain = sum(sums.plain);
  const int32_t nan = plain != plain ? first_nan(of.most + from, num_tiles) : -1;
  const int64_t tile = nan >= 0 ? nan : top_of(of.score + from, num_tiles).index;
  return {tile * lego::kTile + of.index[from + tile], nan >= 0 ? plain : top.value,
          top.second > second.value ? top.second : second.value, plain, sum(sums.weighted)};
}

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "exits.h"
#include "filter_logits.h"

namespace lego {

struct ExitInputs {
  const void *h, *head;  // [B, D], [V, D]
  int64_t h_stride, head_stride;
  int64_t B, D, V, num_tiles;
  PerRow<float> temperature;  // without data: nothing is drawn
  PerRow<int64_t> seed, offset;
  float* logits;  // [B, num_tiles * kTile], or null
};

// What the workspace keeps of the logits of each row and tile: arrays [B, num_tiles].
struct ExitPartials {
  float *most, *second;   // the largest logit and the second largest; NaN if one is NaN
  float *sum, *weighted;  // of e^d and e^d * d, where d is a logit less the largest
  float* score;           // the largest of the logits with noise
  int32_t* index;         // its index in the tile, or that of the first NaN

  ExitPartials(float* workspace, int64_t size) {
    for (float** array : {&most, &second, &sum, &weighted, &score}) *array = workspace, workspace += size;
    index = reinterpret_cast<int32_t*>(workspace);
  }
};

struct ExitSummary {
  int64_t token;
  float most, second, sum, weighted;
};

}  // namespace lego

#define LEGO_OP_FILE "exit_decision.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

using lego::Criterion;

Criterion criterion_of(const std::string& name) {
  if (name == "max_prob") return Criterion::max_prob;
  if (name == "margin") return Criterion::margin;
  LEGO_CHECK_VALUE(name == "entropy",
                   "exit_decision: criterion must be one of max_prob, margin, entropy, got " << name);
  return Criterion::entropy;
}

float confidence_of(Criterion criterion, const lego::ExitSummary& row, int64_t V) {
  if (row.most == -std::numeric_limits<float>::infinity()) return 0;
  if (criterion == Criterion::max_prob) return 1 / row.sum;
  if (criterion == Criterion::margin) return -std::expm1(row.second - row.most) / row.sum;
  const float entropy = std::log(row.sum) - row.weighted / row.sum;
  // a NaN stays one
  return std::clamp(1 - entropy / std::log(static_cast<float>(std::max<int64_t>(V, 2))), 0.0f, 1.0f);
}

float lse_of(const lego::ExitSummary& row) {
  return std::isinf(row.most) ? row.most : row.most + std::log(row.sum);
}

void check_rows(const lego::PerRow<float>& threshold, const lego::PerRow<float>& temperature, int64_t B) {
  for (int64_t row = 0; row < B; ++row) {
    LEGO_CHECK_VALUE(!std::isnan(threshold[row]), "exit_decision: threshold must not be NaN, got nan");
    const float t = temperature.data == nullptr ? 0 : temperature[row];
    LEGO_CHECK_VALUE(std::isfinite(t) && t >= 0,
                     "exit_decision: temperature must be finite and >= 0, got " << t << " in row " << row);
  }
}

// The normed rows go to `normed`.
template <class T>
void fill_partials(lego::ExitInputs in, const void* norm_weight, float eps,
                   const lego::ExitPartials& partials, T* normed) {
  if (norm_weight != nullptr) {
    const auto norm = LEGO_KERNEL(norm_row<T>);
    const auto *h = static_cast<const T*>(in.h), *weight = static_cast<const T*>(norm_weight);
    for (int64_t b = 0; b < in.B; ++b) norm(h + b * in.h_stride, weight, eps, in.D, normed + b * in.D);
    in.h = normed;
    in.h_stride = in.D;
  }
  const auto kernel = LEGO_KERNEL(exit_tiles<T>);
  // 256 KiB of weights a thread at least: some 10 us of reading, where waking it costs 6
  const int64_t tile_bytes = lego::kTile * in.D * static_cast<int64_t>(sizeof(T));
  torch::stable::parallel_for(0, in.num_tiles, std::max<int64_t>(1, (256 << 10) / tile_bytes),
                              [&](int64_t begin, int64_t end) { kernel(in, partials, begin, end); });
}

// Leaves tokens out of the draw, and draws again.
void filter_and_draw(const lego::ExitInputs& in, const lego::ExitRequest& by,
                     const lego::ExitPartials& partials) {
  const auto draw = LEGO_KERNEL(draw_kept);
  std::vector<float> values;
  lego::LikelyFirst heap;
  for (int64_t row = 0; row < in.B; ++row) {
    const float* most = partials.most + row * in.num_tiles;
    if (std::any_of(most, most + in.num_tiles, [](float x) { return std::isnan(x); })) continue;
    float* logits = in.logits + row * in.num_tiles * lego::kTile;
    lego::keep_top_k(logits, in.V, by.top_k, values);
    lego::keep_top_p(logits, in.V, by.top_p, by.top_p_temperature, heap);
    draw(in, partials, row);
  }
}

}  // namespace

void lego::decide_exits(const ExitRequest& request, const ExitResults& out) {
  ExitInputs in;
  in.h = request.h, in.h_stride = request.h_stride;
  in.head = request.head, in.head_stride = request.head_stride;
  in.B = request.B, in.D = request.D, in.V = request.V;
  in.num_tiles = (in.V + kTile - 1) / kTile;
  in.temperature = request.temperature, in.seed = request.seed, in.offset = request.offset;
  const bool filtered = request.temperature.data != nullptr && (request.top_k > 0 || request.top_p < 1);
  in.logits = filtered ? request.logits : nullptr;
  check_rows(request.threshold, in.temperature, in.B);

  const ExitPartials partials(request.workspace, in.B * in.num_tiles);
  with_dtype("exit_decision", request.dtype, [&](auto type) {
    auto* normed = reinterpret_cast<decltype(type)*>(partials.index + in.B * in.num_tiles);
    fill_partials(in, request.norm_weight, request.eps, partials, normed);
  });
  if (filtered) filter_and_draw(in, request, partials);
  const auto merge = LEGO_KERNEL(merge_tiles);
  for (int64_t b = 0; b < in.B; ++b) {
    const ExitSummary row = merge(partials, b, in.num_tiles);
    const float sure = confidence_of(request.criterion, row, in.V);
    out.token[b] = row.token;
    out.confidence[b] = sure;
    out.lse[b] = lse_of(row);
    out.exit[b] = sure >= request.threshold[b];
  }
}

namespace {

// h [B, D] and head [vocab_size or more, D] of one dtype, last strides 1; outputs [B], contiguous
void exit_decision_cpu(const Tensor& h, const Tensor& head, std::optional<Tensor> norm_weight, double eps,
                       const Tensor& threshold, std::string criterion, int64_t vocab_size,
                       std::optional<Tensor> temperature, std::optional<Tensor> seed,
                       std::optional<Tensor> offset, Tensor token, Tensor confidence, Tensor lse, Tensor exit,
                       Tensor workspace) {
  lego::ExitRequest in;
  in.dtype = h.scalar_type();
  in.h = h.data_ptr(), in.h_stride = h.stride(0);
  in.head = head.data_ptr(), in.head_stride = head.stride(0);
  in.norm_weight = norm_weight ? norm_weight->data_ptr() : nullptr;
  in.B = h.size(0), in.D = h.size(1), in.V = vocab_size;
  in.eps = static_cast<float>(eps);
  in.criterion = criterion_of(criterion);
  in.threshold = lego::PerRow<float>(threshold);
  in.temperature = lego::PerRow<float>(temperature);
  in.seed = lego::PerRow<int64_t>(seed), in.offset = lego::PerRow<int64_t>(offset);
  in.workspace = static_cast<float*>(workspace.data_ptr());
  lego::decide_exits(in, {static_cast<int64_t*>(token.data_ptr()), static_cast<float*>(confidence.data_ptr()),
                          static_cast<float*>(lse.data_ptr()), static_cast<bool*>(exit.data_ptr())});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("exit_decision", TORCH_BOX(&exit_decision_cpu)); }

#endif
