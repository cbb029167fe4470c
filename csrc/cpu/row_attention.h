// Attention of one token's heads over the slots of a cache. Compiled once per instruction set, as
// for_each_isa.h says.

constexpr int64_t kTileSlots = 128;  // their weights, 8 KiB at most, stay in the first-level cache
constexpr int64_t kMaxHeads = 16;    // that share one pass over the keys and values
constexpr int64_t kMaxWidth = 256;   // output columns of one pass; wider heads take several

// q . k[n] for kLanes slots; the lanes from `count` on repeat the last slot
template <bool all_slots, class T>
inline Vec dot_slots(const T* q, const T* k, int64_t k_stride, int64_t count, int64_t E) {
  typedef Step<T> S;
  Vec acc[kLanes] = {};
  int64_t i = 0;
  const auto add = [&](const auto& read) __attribute__((always_inline)) {
    const typename S::Values query = read(q);
    const T* key = k;
    for (int n = 0; n < kLanes; ++n) {
      acc[n] = S::add(acc[n], query, read(key));
      if (all_slots || n + 1 < count) key += k_stride;
    }
  };
  for (; i + S::kWidth <= E; i += S::kWidth) {
    add([&](const T* from) __attribute__((always_inline)) { return S::read(from + i); });
  }
  if (i < E) {
    add([&](const T* from) __attribute__((always_inline)) { return S::read_first(from + i, E - i); });
  }
  return sum_each(acc);
}

// score[h * kTileSlots + s] = q[h] . k[s] * scale, and -inf from s = count to the end of the vector
template <class T>
inline void score_tile(const T* q, int64_t q_stride, int64_t num_heads, const T* k, int64_t k_stride,
                       int64_t count, int64_t E, float scale, float* score) {
  for (int64_t s = 0; s < count; s += kLanes) {
    for (int64_t h = 0; h < num_heads; ++h) {
      float* to = score + h * kTileSlots + s;
      const T *query = q + h * q_stride, *key = k + s * k_stride;
      if (s + kLanes <= count) {
        store(to, dot_slots<true>(query, key, k_stride, kLanes, E) * scale);
      } else {
        store(to, dot_slots<false>(query, key, k_stride, count - s, E) * scale);
        for (int64_t n = count - s; n < kLanes; ++n) to[n] = -__builtin_inff();
      }
    }
  }
}

// The softmax of one head so far: the largest score, and the sum of the weights exp(score - most).
struct Softmax {
  float most = -__builtin_inff(), total = 0;

  // Turns the scores of a tile into weights; returns what the weights before it shrink by.
  float add_tile(float* score, int64_t count) {
    Vec highest = splat(most);
    for (int64_t s = 0; s < count; s += kLanes) highest = max(load(score + s), highest);
    const float before = most;
    most = largest(highest);
    // where every score is -inf, -inf - -inf would be NaN: weights of 0 are right
    const float base = most == -__builtin_inff() ? 0 : most;
    Vec weights = {};
    for (int64_t s = 0; s < count; s += kLanes) {
      const Vec weight = exp(load(score + s) - base);
      store(score + s, weight);
      weights += weight;
    }
    const float shrink = exp(splat(before - base))[0];
    total = total * shrink + sum(weights);
    return shrink;
  }
};

// acc[r] = acc[r] * shrink[r] + weight[r] . values, for R heads and N vectors of columns
template <int R, int N, class Read>
__attribute__((always_inline)) inline void add_columns(const float* weight, const float* shrink,
                                                       int64_t count, float* acc, const Read& read) {
  Vec sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = load(acc + r * kMaxWidth + n * kLanes) * shrink[r];
  }
  for (int64_t s = 0; s < count; ++s) {
    for (int n = 0; n < N; ++n) {
      const Vec value = read(s, n);
      for (int r = 0; r < R; ++r) sums[r][n] += weight[r * kTileSlots + s] * value;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) store(acc + r * kMaxWidth + n * kLanes, sums[r][n]);
  }
}

template <int R, class T>
inline void add_values(const float* weight, const float* shrink, const T* v, int64_t v_stride, int64_t count,
                       int64_t width, float* acc) {
  // as many sums at once as hide the latency of one and fit in the registers
  constexpr int N = kLanes == 16 || R <= 2 ? 4 : 2;
  int64_t c = 0;
  const auto whole = [&](int64_t s, int n) __attribute__((always_inline)) {
    const T* from = v + s * v_stride + c;
    return load(from + n * kLanes);
  };
  for (; c + N * kLanes <= width; c += N * kLanes) {
    add_columns<R, N>(weight, shrink, count, acc + c, whole);
  }
  for (; c + kLanes <= width; c += kLanes) add_columns<R, 1>(weight, shrink, count, acc + c, whole);
  if (c < width) {
    add_columns<R, 1>(weight, shrink, count, acc + c, [&](int64_t s, int) __attribute__((always_inline)) {
      return load_first(v + s * v_stride + c, width - c);
    });
  }
}

// Columns [0, width) of the attention of num_heads <= kMaxHeads query heads over `num_slots` slots of
// the key and value head that they share. Tiles come in one order, so that the bits of a head depend
// on its own query, keys and values alone.
template <class T>
void attend(const T* q, int64_t q_stride, int64_t num_heads, const T* k, int64_t k_stride, const T* v,
            int64_t v_stride, int64_t num_slots, int64_t E, int64_t width, float scale, T* out,
            int64_t out_stride) {
  float score[kMaxHeads * kTileSlots], acc[kMaxHeads * kMaxWidth], shrink[kMaxHeads];
  Softmax softmax[kMaxHeads];
  std::memset(acc, 0, num_heads * kMaxWidth * sizeof *acc);
  for (int64_t s = 0; s < num_slots; s += kTileSlots) {
    const int64_t count = num_slots - s < kTileSlots ? num_slots - s : kTileSlots;
    score_tile(q, q_stride, num_heads, k + s * k_stride, k_stride, count, E, scale, score);
    for (int64_t h = 0; h < num_heads; ++h) shrink[h] = softmax[h].add_tile(score + h * kTileSlots, count);
    for (int64_t h = 0; h < num_heads; h += 4) {
      const int64_t rest = num_heads - h;
      const auto add = rest == 1   ? add_values<1, T>
                       : rest == 2 ? add_values<2, T>
                       : rest == 3 ? add_values<3, T>
                                   : add_values<4, T>;
      add(score + h * kTileSlots, shrink + h, v + s * v_stride, v_stride, count, width, acc + h * kMaxWidth);
    }
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    // no slot seen, or -inf everywhere: zeros
    const float share = softmax[h].total == 0 ? 0 : 1 / softmax[h].total;
    const float* from = acc + h * kMaxWidth;
    T* to = out + h * out_stride;
    for_each_vec(
        width, [&](int64_t c) { store(to + c, load(from + c) * share); },
        [&](int64_t c, int64_t rest) { store_first(to + c, load(from + c) * share, rest); });
  }
}

// As attend, for heads of any number and width.
template <class T>
void decode_attention(const T* q, int64_t q_stride, int64_t num_heads, const T* k, int64_t k_stride,
                      const T* v, int64_t v_stride, int64_t num_slots, int64_t E, float scale, T* out,
                      int64_t out_stride) {
  for (int64_t h = 0; h < num_heads; h += kMaxHeads) {
    const int64_t heads = num_heads - h < kMaxHeads ? num_heads - h : kMaxHeads;
    for (int64_t c = 0; c < E; c += kMaxWidth) {
      const int64_t width = E - c < kMaxWidth ? E - c : kMaxWidth;
      attend(q + h * q_stride, q_stride, heads, k, k_stride, v + c, v_stride, num_slots, E, width, scale,
             out + h * out_stride + c, out_stride);
    }
  }
}
