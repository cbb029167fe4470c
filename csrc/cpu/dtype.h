#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "../check.h"

namespace lego {

// 16-bit floats as they lie in memory; vec.h computes with them in float32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Calls run(T{}) with the C++ type of a dtype.
template <class Run>
void with_dtype(const char* op, torch::headeronly::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return run(float{});
    case torch::headeronly::ScalarType::BFloat16:
      return run(bf16{});
    case torch::headeronly::ScalarType::Half:
      return run(f16{});
    default:
      LEGO_CHECK_VALUE(false, op << ": dtype must be float32, bfloat16 or float16, got scalar type "
                                 << static_cast<int>(dtype));
  }
}

}  // namespace lego
