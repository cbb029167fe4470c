#ifdef LEGO_ISA_PASS

template <class T>
inline Vec load_up_to(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load_first(from, count);
}

// The sum over a row of what add(sum, i, count) adds for its values [i, i + count), in an order that
// depends on the width alone. Four sums, so that no addition waits for the one before it.
template <class Add>
inline float sum_over(int64_t size, const Add& add) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    for (int n = 0; n < 4; ++n) add(sums[n], i + n * kLanes, kLanes);
  }
  for (; i + kLanes <= size; i += kLanes) add(sums[0], i, kLanes);
  if (i < size) add(sums[0], i, size - i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// sigmoid(norm(h) . weight + bias) of one row, without the norm if norm_weight is null. norm(h) is
// not rounded to T: eager PyTorch, which has to, errs by 1e-3 in bfloat16, and this by 1e-7.
template <class T>
float exit_gate_score(const T* h, const T* weight, const T* norm_weight, float eps, float bias, int64_t D) {
  float z;
  if (norm_weight == nullptr) {
    z = sum_over(D, [&](Vec& sum, int64_t i, int64_t count) {
      sum += load_up_to(h + i, count) * load_up_to(weight + i, count);
    });
  } else {
    const float squares = sum_over(D, [&](Vec& sum, int64_t i, int64_t count) {
      const Vec x = load_up_to(h + i, count);
      sum += x * x;
    });
    const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(D) + eps);
    z = sum_over(D, [&](Vec& sum, int64_t i, int64_t count) {
      const Vec normed = load_up_to(h + i, count) * scale * load_up_to(norm_weight + i, count);
      sum += normed * load_up_to(weight + i, count);
    });
  }
  return 1.0f / (1.0f + exp(splat(-(z + bias)))[0]);
}

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "dtype.h"
#include "exits.h"
#define LEGO_OP_FILE "exit_gate.cpp"
#include "for_each_isa.h"

namespace {

using torch::stable::Tensor;

float first_value(const void* x, torch::headeronly::ScalarType dtype) {
  float value;
  lego::with_dtype("exit_gate", dtype, [&](auto type) {
    value = lego::scalar::to_float(*static_cast<const decltype(type)*>(x));
  });
  return value;
}

}  // namespace

void lego::gate_exits(const GateRequest& in, float* score, bool* exit) {
  for (int64_t row = 0; row < in.B; ++row) {
    LEGO_CHECK_VALUE(in.threshold[row] == in.threshold[row], "exit_gate: threshold must not be NaN, got nan");
  }
  const float bias = first_value(in.bias, in.bias_dtype);
  with_dtype("exit_gate", in.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = LEGO_KERNEL(exit_gate_score<T>);
    const auto* rows = static_cast<const T*>(in.h);
    const auto *weight = static_cast<const T*>(in.weight), *norm = static_cast<const T*>(in.norm_weight);
    // a thread gets 32,768 values at least: some 5 us, which is what waking it costs
    const int64_t grain = std::max<int64_t>(1, 32768 / in.D);
    torch::stable::parallel_for(0, in.B, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        score[row] = kernel(rows + row * in.h_stride, weight, norm, in.eps, bias, in.D);
        exit[row] = score[row] >= in.threshold[row];
      }
    });
  });
}

namespace {

// h [B, D], gate_weight [D], norm_weight [D] of one dtype, gate_bias of that or float32, one value;
// threshold float32 [] or [B] of any stride, score float32 [B], exit bool [B]; other last strides 1
void exit_gate_cpu(const Tensor& h, const Tensor& gate_weight, const Tensor& gate_bias,
                   const Tensor& threshold, std::optional<Tensor> norm_weight, double eps, Tensor score,
                   Tensor exit) {
  lego::GateRequest in;
  in.dtype = h.scalar_type();
  in.h = h.data_ptr(), in.h_stride = h.stride(0), in.B = h.size(0), in.D = h.size(1);
  in.weight = gate_weight.data_ptr();
  in.norm_weight = norm_weight ? norm_weight->data_ptr() : nullptr;
  in.bias = gate_bias.data_ptr(), in.bias_dtype = gate_bias.scalar_type();
  in.eps = static_cast<float>(eps);
  in.threshold = lego::PerRow<float>(threshold);
  lego::gate_exits(in, static_cast<float*>(score.data_ptr()), static_cast<bool*>(exit.data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lego_kernels, CPU, m) { m.impl("exit_gate", TORCH_BOX(&exit_gate_cpu)); }

#endif
