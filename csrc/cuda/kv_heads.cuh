#pragma once

#include <cstdint>

namespace lego {

// A [B, T or S, H, D] tensor as bytes; the D elements of a head lie together.
struct KvHeads {
  char* data;
  int64_t row, token, head;  // strides in bytes, 0 along a dimension of size 1

  __host__ __device__ char* at(int64_t b, int64_t t, int64_t h) const {
    return data + b * row + t * token + h * head;
  }

  // every address of a head is a multiple of the powers of two that divide this
  uint64_t alignment_bits() const {
    return reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(row | token | head);
  }
};

// The first slot of a row; negative for a row that is not written, because its position says so or
// because it would reach past the cache, which the device cannot report.
__host__ __device__ inline int64_t kv_first_slot(int64_t position, int64_t T, int64_t S) {
  return position <= S - T ? position : -1;
}

}  // namespace lego
