#pragma once

#include <cuda_runtime.h>

namespace lego {

struct SetConditionArgs {
  cudaGraphConditionalHandle handle;
  const bool* predicate;  // one value
};

// Tells the IF node of the handle, which comes after it in the graph, whether to run its body.
__global__ void set_condition_kernel(SetConditionArgs args) {
  cudaGraphSetConditional(args.handle, *args.predicate ? 1 : 0);
}

}  // namespace lego
