#pragma once

#include <cstdint>

namespace lego {

constexpr int kCompactWarps = 8;

struct CompactArgs {
  const bool *exit, *alive;           // [B]
  int64_t exit_stride, alive_stride;  // in elements
  int64_t* index;                     // [B]
  int64_t* count;                     // []
  int64_t B;
};

__host__ __device__ inline bool compact_goes_on(const CompactArgs& args, int64_t row) {
  return row < args.B && args.alive[row * args.alive_stride] && !args.exit[row * args.exit_stride];
}

__host__ __device__ inline int compact_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// How many lanes of a warp before this one go on; bit i of `going_on` is lane i's.
__host__ __device__ inline int compact_rank(uint32_t going_on, int lane) {
  return compact_bits(going_on & ((1u << lane) - 1));
}

// How many rows of the first `warps` warps go on.
__host__ __device__ inline int compact_before(const int* rows_of_warp, int warps) {
  int before = 0;
  for (int w = 0; w < warps; ++w) before += rows_of_warp[w];
  return before;
}

// One block of kCompactWarps warps takes a row a thread, again and again, so that the order holds
// for any number of rows.
__global__ void __launch_bounds__(32 * kCompactWarps) compact_kernel(CompactArgs args) {
  __shared__ int rows_of_warp[kCompactWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t found = 0;  // the same in every thread
  for (int64_t start = 0; start < args.B; start += blockDim.x) {
    const int64_t row = start + threadIdx.x;
    const bool goes_on = compact_goes_on(args, row);
    const uint32_t going_on = __ballot_sync(~0u, goes_on);
    if (lane == 0) rows_of_warp[warp] = compact_bits(going_on);
    __syncthreads();
    if (goes_on) args.index[found + compact_before(rows_of_warp, warp) + compact_rank(going_on, lane)] = row;
    found += compact_before(rows_of_warp, kCompactWarps);
    __syncthreads();  // before the next round overwrites rows_of_warp
  }
  for (int64_t i = found + threadIdx.x; i < args.B; i += blockDim.x) args.index[i] = -1;
  if (threadIdx.x == 0) *args.count = found;
}

}  // namespace lego
