// Attention of one token's heads over the slots of a cache. Compiled once per instruction set, as
// for_each_isa.h says.

constexpr int64_t kTileSlots = 128;  // their weights, 8 KiB at most, stay in the first-level cache
constexpr int64_t kMaxGroup = 16;    // heads that share one pass over a head's keys and values
constexpr int64_t kMaxWidth = 256;   // output columns of one pass; wider heads take several
constexpr int64_t kSums = kMaxGroup * kMaxWidth;  // outputs in the making, 16 KiB
constexpr int64_t kMaxHeads = 64;                 // that have outputs in the making

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

// Memory that is soon read from one end to the other, into the second-level cache.
struct Ahead {
  const char *at, *end;

  void prefetch(int64_t bytes) {
    for (const char* stop = at + bytes < end ? at + bytes : end; at < stop; at += 64)
      __builtin_prefetch(at, 0, 2);
  }
};

// score[h * kTileSlots + s] = q[h] . k[s] * scale, and -inf from s = count to the end of the vector
template <class T>
inline void score_tile(const T* q, int64_t q_stride, int64_t num_heads, const T* k, int64_t k_stride,
                       int64_t count, int64_t E, float scale, float* score, Ahead& ahead_k, Ahead& ahead_v) {
  for (int64_t s = 0; s < count; s += kLanes) {
    ahead_k.prefetch(kLanes * E * sizeof(T));
    ahead_v.prefetch(kLanes * E * sizeof(T));
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

// acc[r] = acc[r] * shrink[r] + weight[r] . values, for R heads and N vectors of columns. The slots go
// to four sums in turn, since each waits for its last addition.
template <int R, int N, class Read>
__attribute__((always_inline)) inline void add_columns(const float* weight, const float* shrink,
                                                       int64_t count, float* acc, int64_t acc_stride,
                                                       const Read& read) {
  constexpr int kTurns = 4;
  Vec sums[kTurns][R][N] = {};
  const auto add = [&](int turn, int64_t s) __attribute__((always_inline)) {
    for (int n = 0; n < N; ++n) {
      const Vec value = read(s, n);
      for (int r = 0; r < R; ++r) sums[turn][r][n] += weight[r * kTileSlots + s] * value;
    }
  };
  int64_t s = 0;
  for (; s + kTurns <= count; s += kTurns) {
    for (int turn = 0; turn < kTurns; ++turn) add(turn, s + turn);
  }
  for (; s < count; ++s) add(0, s);
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      float* to = acc + r * acc_stride + n * kLanes;
      const Vec sum = (sums[0][r][n] + sums[1][r][n]) + (sums[2][r][n] + sums[3][r][n]);
      store(to, load(to) * shrink[r] + sum);
    }
  }
}

template <int R, class T>
inline void add_values(const float* weight, const float* shrink, const T* v, int64_t v_stride, int64_t count,
                       int64_t width, float* acc, int64_t acc_stride) {
  // as many columns at once as fit in the registers, four sums each
  constexpr int N = kLanes == 16 && R <= 2 ? 4 / R : kLanes < 16 && R == 1 ? 2 : 1;
  int64_t c = 0;
  const auto whole = [&](int64_t s, int n) __attribute__((always_inline)) {
    const T* from = v + s * v_stride + c + n * kLanes;
    return load(from);
  };
  for (; c + N * kLanes <= width; c += N * kLanes) {
    add_columns<R, N>(weight, shrink, count, acc + c, acc_stride, whole);
  }
  for (; c + kLanes <= width; c += kLanes)
    add_columns<R, 1>(weight, shrink, count, acc + c, acc_stride, whole);
  if (c < width) {
    add_columns<R, 1>(weight, shrink, count, acc + c, acc_stride,
                      [&](int64_t s, int) __attribute__((always_inline)) {
                        return load_first(v + s * v_stride + c, width - c);
                      });
  }
}

// Keys or values of one row: slots, and heads in a slot, as far apart as the strides say.
template <class T>
struct CacheRow {
  const T* data;
  int64_t slot, head;

  const T* at(int64_t s, int64_t h) const { return data + s * slot + h * head; }
};

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Query heads whose outputs are in the making together.
inline int64_t heads_at_once(int64_t E) {
  const int64_t fitting = kSums / padded(E < kMaxWidth ? E : kMaxWidth);
  return fitting < kMaxHeads ? fitting : kMaxHeads;
}

// The slots [first, first + count).
template <class T>
inline Ahead ahead_of(CacheRow<T> x, int64_t first, int64_t count) {
  return {reinterpret_cast<const char*>(x.at(first, 0)),
          reinterpret_cast<const char*>(x.at(first + count, 0))};
}

// Columns [0, width) of the attention of num_kv heads of the cache, each shared by `group` query heads,
// as many as heads_at_once allows, over `num_slots` slots. A tile of slots serves all heads before the next,
// as it lies in memory. Tiles come in one order, so that the bits of a head depend on its own query, keys and
// values alone.
template <class T>
void attend(const T* q, int64_t q_stride, int64_t group, int64_t num_kv, CacheRow<T> k, CacheRow<T> v,
            int64_t num_slots, int64_t E, int64_t width, float scale, T* out, int64_t out_stride) {
  float score[kMaxGroup * kTileSlots], acc[kSums], shrink[kMaxGroup];
  Softmax softmax[kMaxHeads];
  const int64_t num_heads = num_kv * group, acc_stride = padded(width);
  std::memset(acc, 0, num_heads * acc_stride * sizeof *acc);
  for (int64_t s = 0; s < num_slots; s += kTileSlots) {
    const int64_t count = num_slots - s < kTileSlots ? num_slots - s : kTileSlots;
    const int64_t next = num_slots - s - count < kTileSlots ? num_slots - s - count : kTileSlots;
    Ahead ahead_k = ahead_of(k, s + count, next), ahead_v = ahead_of(v, s + count, next);
    for (int64_t kv = 0; kv < num_kv; ++kv) {
      const int64_t first = kv * group;
      score_tile(q + first * q_stride, q_stride, group, k.at(s, kv), k.slot, count, E, scale, score, ahead_k,
                 ahead_v);
      for (int64_t h = 0; h < group; ++h) {
        shrink[h] = softmax[first + h].add_tile(score + h * kTileSlots, count);
      }
      for (int64_t h = 0; h < group; h += 4) {
        const int64_t rest = group - h;
        const auto add = rest == 1   ? add_values<1, T>
                         : rest == 2 ? add_values<2, T>
                         : rest == 3 ? add_values<3, T>
                                     : add_values<4, T>;
        add(score + h * kTileSlots, shrink + h, v.at(s, kv), v.slot, count, width,
            acc + (first + h) * acc_stride, acc_stride);
      }
    }
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    // no slot seen, or -inf everywhere: zeros
    const float share = softmax[h].total == 0 ? 0 : 1 / softmax[h].total;
    const float* from = acc + h * acc_stride;
    T* to = out + h * out_stride;
    for_each_vec(
        width, [&](int64_t c) { store(to + c, load(from + c) * share); },
        [&](int64_t c, int64_t rest) { store_first(to + c, load(from + c) * share, rest); });
  }
}

// As attend, for heads of any number and width; q is that of the first of num_kv heads of the cache, which
// k and v point to.
template <class T>
void decode_attention(const T* q, int64_t q_stride, int64_t group, int64_t num_kv, const T* k, int64_t k_slot,
                      int64_t k_head, const T* v, int64_t v_slot, int64_t v_head, int64_t num_slots,
                      int64_t E, float scale, T* out, int64_t out_stride) {
  const int64_t at_once = group <= kMaxGroup ? heads_at_once(E) / group : 1;
  for (int64_t kv = 0; kv < num_kv; kv += at_once) {
    const int64_t heads_kv = num_kv - kv < at_once ? num_kv - kv : at_once;
    for (int64_t h = 0; h < group; h += kMaxGroup) {
      const int64_t heads = group - h < kMaxGroup ? group - h : kMaxGroup, first = kv * group + h;
      for (int64_t c = 0; c < E; c += kMaxWidth) {
        const int64_t width = E - c < kMaxWidth ? E - c : kMaxWidth;
        attend(q + first * q_stride, q_stride, heads, heads_kv, {k + kv * k_head, k_slot, k_head},
               {v + kv * v_head + c, v_slot, v_head}, num_slots, E, width, scale,
               out + first * out_stride + c, out_stride);
      }
    }
  }
}
