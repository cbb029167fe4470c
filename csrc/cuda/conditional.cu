// IF nodes in a CUDA graph that is being captured; lego_kernels/decoder/graph_step.py is their caller.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "../check.h"
#include "launch.h"

// CUDA 12.3 has the calls, 12.4 is the first whose bodies may hold IF nodes; without them the ops are
// not registered, and Python says so
#if CUDART_VERSION >= 12040

#include "conditional.cuh"

namespace {

using torch::stable::Tensor;

void check(cudaError_t error, const char* call) {
  STD_TORCH_CHECK(error == cudaSuccess, call, " must succeed, got ", cudaGetErrorString(error));
}

// The stream that bodies at a depth of nesting are captured on. One of torch's pool might be the one
// that captures around them. Never destroyed: cuBLAS keeps a workspace for each stream it has seen.
cudaStream_t body_stream(int32_t device, int64_t depth) {
  static std::mutex mutex;
  static std::map<std::pair<int32_t, int64_t>, cudaStream_t> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& stream = streams[{device, depth}];
  if (stream == nullptr) {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  return stream;
}

// What a stream captures into, and what the next node will wait for.
struct Capture {
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t num_nodes = 0;
};

Capture capture_on(cudaStream_t stream) {
  Capture capture;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &capture.graph, &capture.nodes, &capture.edges,
                                 &capture.num_nodes),
        "cudaStreamGetCaptureInfo");
#else
  check(
      cudaStreamGetCaptureInfo(stream, &status, nullptr, &capture.graph, &capture.nodes, &capture.num_nodes),
      "cudaStreamGetCaptureInfo");
#endif
  STD_TORCH_CHECK(status == cudaStreamCaptureStatusActive,
                  "begin_if: the current stream must be capturing, got capture status ",
                  static_cast<int>(status));
  return capture;
}

// An IF node after what the stream has captured so far; what it captures from now on waits for the
// node. Returns the graph of its body.
cudaGraph_t add_if_node(cudaStream_t stream, cudaGraphConditionalHandle handle) {
  const Capture before = capture_on(stream);
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaGraphAddNode(&node, before.graph, before.nodes, before.edges, before.num_nodes, &params),
        "cudaGraphAddNode");
  check(cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies),
        "cudaStreamUpdateCaptureDependencies");
#else
  check(cudaGraphAddNode(&node, before.graph, before.nodes, before.num_nodes, &params), "cudaGraphAddNode");
  check(cudaStreamUpdateCaptureDependencies(stream, &node, 1, cudaStreamSetCaptureDependencies),
        "cudaStreamUpdateCaptureDependencies");
#endif
  return params.conditional.phGraph_out[0];
}

int64_t if_stream_cuda(const Tensor& predicate, int64_t depth) {
  const lego::LaunchGuard guard(predicate);
  // loads the kernel, which no capture should have to
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, lego::set_condition_kernel), "cudaFuncGetAttributes");
  return reinterpret_cast<int64_t>(body_stream(predicate.get_device_index(), depth));
}

void begin_if_cuda(const Tensor& predicate, int64_t depth) {
  LEGO_CHECK_VALUE(predicate.scalar_type() == torch::headeronly::ScalarType::Bool && predicate.numel() == 1,
                   "begin_if: predicate must be one bool, got " << predicate.numel() << " of scalar type "
                                                                << static_cast<int>(predicate.scalar_type()));
  const lego::LaunchGuard guard(predicate);
  const cudaStream_t stream = guard.stream(), body = body_stream(predicate.get_device_index(), depth);
  cudaGraphConditionalHandle handle{};
  // no default value: the kernel right before the node sets it in every run
  check(cudaGraphConditionalHandleCreate(&handle, capture_on(stream).graph, 0, 0),
        "cudaGraphConditionalHandleCreate");
  const lego::SetConditionArgs args{handle, static_cast<const bool*>(predicate.data_ptr())};
  lego::set_condition_kernel<<<1, 1, 0, stream>>>(args);
  lego::check_launch("begin_if");
  const cudaGraph_t graph = add_if_node(stream, handle);
  check(cudaStreamBeginCaptureToGraph(body, graph, nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCaptureToGraph");
}

void end_if_cuda(const Tensor& predicate, int64_t depth) {
  const lego::LaunchGuard guard(predicate);
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(body_stream(predicate.get_device_index(), depth), &graph),
        "cudaStreamEndCapture");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CUDA, m) {
  m.impl("if_stream", TORCH_BOX(&if_stream_cuda));
  m.impl("begin_if", TORCH_BOX(&begin_if_cuda));
  m.impl("end_if", TORCH_BOX(&end_if_cuda));
}

#endif
