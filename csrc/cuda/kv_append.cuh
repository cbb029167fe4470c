#pragma once

#include <cstdint>
#include <initializer_list>

namespace lego {

// A [B, T or S, H, D] tensor as bytes; the D elements of a head lie together.
struct KvHeads {
  char* data;
  int64_t row, token, head;  // strides in bytes, 0 along a dimension of size 1
};

struct KvAppendArgs {
  KvHeads k_cache, v_cache, k, v;
  const int64_t* position;  // [B]
  int64_t position_stride;  // in elements
  int64_t B, T, S;
  int H, words_per_head;
};

// The first slot of a row; negative for a row that is not written, because its position says so or
// because it would reach past the cache, which the device cannot report.
__host__ __device__ inline int64_t kv_first_slot(int64_t position, int64_t T, int64_t S) {
  return position <= S - T ? position : -1;
}

// The widest access, in bytes and at most 16, that every address of the copy is a multiple of.
inline int kv_word_bytes(const KvAppendArgs& args, int64_t head_bytes) {
  uint64_t bits = static_cast<uint64_t>(head_bytes) | 16;
  for (const KvHeads& x : {args.k_cache, args.v_cache, args.k, args.v}) {
    bits |= reinterpret_cast<uint64_t>(x.data) | static_cast<uint64_t>(x.row | x.token | x.head);
  }
  return static_cast<int>(bits & (~bits + 1));
}

// One block copies one token's heads, of k where blockIdx.y is 0 and of v where it is 1.
template <typename Word>
__global__ void kv_append_kernel(KvAppendArgs args) {
  const KvHeads cache = blockIdx.y == 0 ? args.k_cache : args.v_cache;
  const KvHeads fresh = blockIdx.y == 0 ? args.k : args.v;
  for (int64_t i = blockIdx.x; i < args.B * args.T; i += gridDim.x) {
    const int64_t b = i / args.T, t = i % args.T;
    const int64_t slot = kv_first_slot(args.position[b * args.position_stride], args.T, args.S);
    if (slot < 0) continue;
    char* to = cache.data + b * cache.row + (slot + t) * cache.token;
    const char* from = fresh.data + b * fresh.row + t * fresh.token;
    for (int j = threadIdx.x; j < args.H * args.words_per_head; j += blockDim.x) {
      const int64_t h = j / args.words_per_head, word = j % args.words_per_head;
      reinterpret_cast<Word*>(to + h * cache.head)[word] =
          reinterpret_cast<const Word*>(from + h * fresh.head)[word];
    }
  }
}

}  // namespace lego
