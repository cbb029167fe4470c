#ifdef LEGO_ISA_PASS

inline IntVec lane_numbers() {
  IntVec number = {};
  for (int i = 0; i < kLanes; ++i) number[i] = i;
  return number;
}

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

// the even lanes of a times b, 64 bits each
typedef uint64_t WideVec __attribute__((vector_size(4 * LEGO_LANES)));
inline WideVec multiply_even(WideVec a, uint32_t b) {
#if LEGO_LANES == 16
  return (WideVec)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif LEGO_LANES == 8
  return (WideVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

// Philox4x32-10, one counter in each lane. Source: Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3".
inline void philox(UintVec counter[4], uint64_t key) {
  const uint32_t multiplier[] = {0xD2511F53, 0xCD9E8D57};
  uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    UintVec low[2], high[2];
    for (int i = 0; i < 2; ++i) {
      const WideVec pairs = (WideVec)counter[2 * i];
      const WideVec even = multiply_even(pairs, multiplier[i]),
                    odd = multiply_even(pairs >> 32, multiplier[i]);
      low[i] = (UintVec)((even & 0xffffffff) | odd << 32);
      high[i] = (UintVec)(even >> 32 | (odd & 0xffffffff00000000));
    }
    counter[0] = high[1] ^ counter[1] ^ key_low;
    counter[1] = low[1];
    counter[2] = high[0] ^ counter[3] ^ key_high;
    counter[3] = low[0];
    key_low += 0x9E3779B9;
    key_high += 0xBB67AE85;
  }
}

// -log(-log(1 - u)) with u = (x + 1/2) / 2^32. Of u and 1 - u the one below 1/2 is exact to a
// rounding; log(1 - u) from a rounded 1 - u lacks the rounding, which near 0 is its derivative too.
inline Vec gumbel(UintVec x) {
  const IntVec is_low = (IntVec)x >= 0;
  const IntVec nearer = is_low ? (IntVec)x : ~(IntVec)x;
  const Vec part = (__builtin_convertvector(nearer, Vec) + 0.5f) * 0x1p-32f;
  const Vec rounded = where(is_low, 1.0f - part, part);
  const Vec lack = where(is_low, part - (1.0f - rounded), Vec{});
  return -log(lack - log(rounded));
}

// out[i] = x[i] + temperature * noise of token `first` + i, for a tile; first is a multiple of 4
inline void perturb(const float* x, float temperature, uint64_t seed, uint64_t offset, int64_t first,
                    float* out) {
  for (int64_t i = 0; i < lego::kTile; i += 4 * kLanes) {
    const UintVec quad = (UintVec)lane_numbers() + static_cast<uint32_t>((first + i) / 4);
    UintVec words[4] = {quad, UintVec{} + static_cast<uint32_t>(offset),
                        UintVec{} + static_cast<uint32_t>(offset >> 32), UintVec{}};
    philox(words, seed);
    float noise[4][kLanes];
    for (int word = 0; word < 4; ++word) store(noise[word], gumbel(words[word]));
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int word = 0; word < 4; ++word) {
        const int64_t token = i + 4 * lane + word;
        out[token] = x[token] + temperature * noise[word][lane];
      }
    }
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
  Top drawn = top;
  // at temperature 0 the noise has no weight
  if (in.temperature.data != nullptr && in.temperature[row] > 0) {
    float score[lego::kTile];
    perturb(logits, in.temperature[row], static_cast<uint64_t>(in.seed[row]),
            static_cast<uint64_t>(in.offset[row]), tile * lego::kTile, score);
    drawn = top_of(score, lego::kTile);
  }
  const int32_t nan = plain != plain ? first_nan(logits, lego::kTile) : -1;
  if (nan >= 0) top.value = top.second = drawn.value = plain, drawn.index = nan;
  const int64_t i = row * in.num_tiles + tile;
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

#include "dtype.h"
#include "rows.h"

namespace lego {

// Rows of the head whose logits are reduced at once. Whatever B is and however many threads there
// are, the tiles are the same, and so are the bits of a row.
constexpr int64_t kTile = 128;

struct ExitInputs {
  const void *h, *head;  // [B, D], [V, D]
  int64_t h_stride, head_stride;
  int64_t B, D, V, num_tiles;
  PerRow<float> temperature;  // without data: nothing is drawn
  PerRow<int64_t> seed, offset;
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

enum class Criterion { max_prob, margin, entropy };

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
void fill_partials(lego::ExitInputs in, const std::optional<Tensor>& norm_weight, float eps,
                   const lego::ExitPartials& partials, T* normed) {
  if (norm_weight) {
    const auto norm = LEGO_KERNEL(norm_row<T>);
    const auto* h = static_cast<const T*>(in.h);
    const auto* weight = static_cast<const T*>(norm_weight->data_ptr());
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

// h [B, D] and head [vocab_size or more, D] of one dtype, last strides 1; outputs [B], contiguous
void exit_decision_cpu(const Tensor& h, const Tensor& head, std::optional<Tensor> norm_weight, double eps,
                       const Tensor& threshold, std::string criterion, int64_t vocab_size,
                       std::optional<Tensor> temperature, std::optional<Tensor> seed,
                       std::optional<Tensor> offset, Tensor token, Tensor confidence, Tensor lse, Tensor exit,
                       Tensor workspace) {
  const Criterion by = criterion_of(criterion);
  const lego::PerRow<float> thresholds(threshold);
  lego::ExitInputs in;
  in.h = h.data_ptr(), in.h_stride = h.stride(0);
  in.head = head.data_ptr(), in.head_stride = head.stride(0);
  in.B = h.size(0), in.D = h.size(1), in.V = vocab_size;
  in.num_tiles = (vocab_size + lego::kTile - 1) / lego::kTile;
  in.temperature = lego::PerRow<float>(temperature);
  in.seed = lego::PerRow<int64_t>(seed), in.offset = lego::PerRow<int64_t>(offset);
  check_rows(thresholds, in.temperature, in.B);

  const lego::ExitPartials partials(static_cast<float*>(workspace.data_ptr()), in.B * in.num_tiles);
  lego::with_dtype("exit_decision", h.scalar_type(), [&](auto type) {
    auto* normed = reinterpret_cast<decltype(type)*>(partials.index + in.B * in.num_tiles);
    fill_partials(in, norm_weight, static_cast<float>(eps), partials, normed);
  });
  const auto merge = LEGO_KERNEL(merge_tiles);
  for (int64_t b = 0; b < in.B; ++b) {
    const lego::ExitSummary row = merge(partials, b, in.num_tiles);
    const float sure = confidence_of(by, row, vocab_size);
    static_cast<int64_t*>(token.data_ptr())[b] = row.token;
    static_cast<float*>(confidence.data_ptr())[b] = sure;
    static_cast<float*>(lse.data_ptr())[b] = lse_of(row);
    static_cast<bool*>(exit.data_ptr())[b] = sure >= thresholds[b];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("exit_decision", TORCH_BOX(&exit_decision_cpu)); }

#endif
