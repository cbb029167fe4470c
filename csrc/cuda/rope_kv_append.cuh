#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>

#include "kv_heads.cuh"

namespace lego {

struct RopeKvAppendArgs {
  KvHeads q_out, k_cache, v_cache, qkv;  // qkv holds a token's query, key and value heads in turn
  const float *cos, *sin;                // [P, half]
  int64_t cos_stride, sin_stride;        // in elements
  const int64_t *position, *slot;        // [B]
  int64_t position_stride, slot_stride;  // in elements
  const void *q_norm, *k_norm;           // [2 * half], or null
  int64_t B, T, S, P;
  float eps;
  int Hq, Hkv, half;  // query heads, key-value heads, half the width of a head
  int lanes;          // threads that share a head: a power of two, at most 32
};

// Whether every access can be one of 16 bytes.
inline bool rope_is_aligned(const RopeKvAppendArgs& args, int64_t element_bytes) {
  uint64_t bits = static_cast<uint64_t>(args.half * element_bytes);
  bits |= static_cast<uint64_t>((args.cos_stride | args.sin_stride) * 4);
  for (const void* x : std::initializer_list<const void*>{args.cos, args.sin, args.q_norm, args.k_norm}) {
    bits |= reinterpret_cast<uint64_t>(x);
  }
  for (const KvHeads& x : {args.q_out, args.k_cache, args.v_cache, args.qkv}) bits |= x.alignment_bits();
  return bits % 16 == 0;
}

// One thread for each chunk of half a head, up to a warp.
inline int rope_lanes(int chunks) {
  int lanes = 1;
  while (lanes < chunks && lanes < 32) lanes *= 2;
  return lanes;
}

// The lanes of its warp that share a thread's head.
__host__ __device__ inline uint32_t rope_lane_mask(int thread, int lanes) {
  return (lanes == 32 ? ~0u : (1u << lanes) - 1) << (thread % 32 / lanes * lanes);
}

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float to_float(__half x) { return __half2float(x); }
__host__ __device__ inline void from_float(float x, float* to) { *to = x; }
__host__ __device__ inline void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__host__ __device__ inline void from_float(float x, __half* to) { *to = __float2half_rn(x); }

// N values that lie together, read and written 16 bytes at a time where there are as many.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Chunk {
  T value[N];
};

template <int N, typename T>
__host__ __device__ inline Chunk<T, N> load_chunk(const T* from) {
  return *reinterpret_cast<const Chunk<T, N>*>(from);
}

// One token: its row of the tables, negative if it is not written at all, and its slot, negative if
// it appends nothing.
struct RopeToken {
  int64_t b, t, table_row, slot;
};

__host__ __device__ inline RopeToken rope_token(const RopeKvAppendArgs& args, int64_t i) {
  const int64_t b = i / args.T, t = i % args.T;
  const int64_t position = args.position[b * args.position_stride];
  const int64_t slot = args.slot[b * args.slot_stride];
  // out of range, which the device cannot report
  if (position < 0 || position > args.P - args.T || slot > args.S - args.T) return {b, t, -1, -1};
  return {b, t, position + t, slot < 0 ? -1 : slot + t};
}

// One head of a token, counted over its queries, keys and values.
template <typename T>
struct RopeHead {
  const T *from, *norm;  // norm is null where there is none
  T* to;                 // null for a head that is not written
  bool rotated;
};

template <typename T>
__host__ __device__ inline RopeHead<T> rope_head(const RopeKvAppendArgs& args, const RopeToken& token,
                                                 int h) {
  const auto* from = reinterpret_cast<const T*>(args.qkv.at(token.b, token.t, h));
  if (h < args.Hq) {
    T* to = reinterpret_cast<T*>(args.q_out.at(token.b, token.t, h));
    return {from, static_cast<const T*>(args.q_norm), to, true};
  }
  if (token.slot < 0) return {from, nullptr, nullptr, false};
  const int key = h - args.Hq, value = key - args.Hkv;
  if (value < 0) {
    T* to = reinterpret_cast<T*>(args.k_cache.at(token.b, token.slot, key));
    return {from, static_cast<const T*>(args.k_norm), to, true};
  }
  return {from, nullptr, reinterpret_cast<T*>(args.v_cache.at(token.b, token.slot, value)), false};
}

// The squares that one of the lanes of a head sums.
template <int N, typename T>
__host__ __device__ inline float rope_squares(const T* from, int half, int lane, int lanes) {
  float squares = 0;
  for (int i = lane * N; i < half; i += lanes * N) {
    const auto first = load_chunk<N>(from + i), second = load_chunk<N>(from + half + i);
    for (int j = 0; j < N; ++j) {
      const float a = to_float(first.value[j]), b = to_float(second.value[j]);
      squares += a * a + b * b;
    }
  }
  return squares;
}

// Scales by the norm, and rounds to T as an RMSNorm of its own would.
template <int N, typename T>
__host__ __device__ inline void rope_normalize(Chunk<T, N>* x, const T* norm, float scale) {
  const auto weight = load_chunk<N>(norm);
  for (int j = 0; j < N; ++j) {
    from_float(to_float(x->value[j]) * scale * to_float(weight.value[j]), &x->value[j]);
  }
}

// What one lane writes: its chunks of both halves, rotated with each other unless they are values.
template <int N, typename T>
__host__ __device__ inline void rope_write(const RopeKvAppendArgs& args, int64_t table_row,
                                           const RopeHead<T>& head, float scale, int lane) {
  const float* cos_row = args.cos + table_row * args.cos_stride;
  const float* sin_row = args.sin + table_row * args.sin_stride;
  for (int i = lane * N; i < args.half; i += args.lanes * N) {
    auto first = load_chunk<N>(head.from + i), second = load_chunk<N>(head.from + args.half + i);
    if (head.norm != nullptr) {
      rope_normalize<N>(&first, head.norm + i, scale);
      rope_normalize<N>(&second, head.norm + args.half + i, scale);
    }
    if (head.rotated) {
      const auto cos = load_chunk<N>(cos_row + i), sin = load_chunk<N>(sin_row + i);
      for (int j = 0; j < N; ++j) {
        const float a = to_float(first.value[j]), b = to_float(second.value[j]);
        from_float(a * cos.value[j] - b * sin.value[j], &first.value[j]);
        from_float(b * cos.value[j] + a * sin.value[j], &second.value[j]);
      }
    }
    *reinterpret_cast<Chunk<T, N>*>(head.to + i) = first;
    *reinterpret_cast<Chunk<T, N>*>(head.to + args.half + i) = second;
  }
}

__host__ __device__ inline float rope_scale(float squares, int half, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(2 * half) + eps);
}

// A block takes some heads of one token, args.lanes threads a head and N values an access.
template <typename T, int N>
__global__ void rope_kv_append_kernel(RopeKvAppendArgs args) {
  const int lane = threadIdx.x % args.lanes, heads_per_block = blockDim.x / args.lanes;
  const int num_heads = args.Hq + 2 * args.Hkv;
  for (int64_t i = blockIdx.x; i < args.B * args.T; i += gridDim.x) {
    const RopeToken token = rope_token(args, i);
    if (token.table_row < 0) continue;
    for (int h = blockIdx.y * heads_per_block + threadIdx.x / args.lanes; h < num_heads;
         h += gridDim.y * heads_per_block) {
      const RopeHead<T> head = rope_head<T>(args, token, h);
      if (head.to == nullptr) continue;
      float scale = 1;
      if (head.norm != nullptr) {
        float squares = rope_squares<N>(head.from, args.half, lane, args.lanes);
        const uint32_t mask = rope_lane_mask(threadIdx.x, args.lanes);
        for (int offset = args.lanes / 2; offset > 0; offset /= 2) {
          squares += __shfl_xor_sync(mask, squares, offset);
        }
        scale = rope_scale(squares, args.half, args.eps);
      }
      rope_write<N>(args, token.table_row, head, scale, lane);
    }
  }
}

}  // namespace lego
