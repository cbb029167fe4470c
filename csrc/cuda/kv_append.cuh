#pragma once

#include <cstdint>
#include <initializer_list>

#include "kv_heads.cuh"

namespace lego {

struct KvAppendArgs {
  KvHeads k_cache, v_cache, k, v;
  const int64_t* position;  // [B]
  int64_t position_stride;  // in elements
  int64_t B, T, S;
  int H, words_per_head;
};

// The widest access, in bytes and at most 16, that every address of the copy is a multiple of.
inline int kv_word_bytes(const KvAppendArgs& args, int64_t head_bytes) {
  uint64_t bits = static_cast<uint64_t>(head_bytes) | 16;
  for (const KvHeads& x : {args.k_cache, args.v_cache, args.k, args.v}) bits |= x.alignment_bits();
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
    for (int j = threadIdx.x; j < args.H * args.words_per_head; j += blockDim.x) {
      const int64_t h = j / args.words_per_head, word = j % args.words_per_head;
      reinterpret_cast<Word*>(cache.at(b, slot + t, h))[word] =
          reinterpret_cast<const Word*>(fresh.at(b, t, h))[word];
    }
  }
}

}  // namespace lego
