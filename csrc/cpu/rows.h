#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace lego {

// The rows of a [..., D] tensor of at most 4 dimensions, whatever the strides of the leading ones.
struct Rows {
  int64_t num_rows = 1;
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};  // of the leading dimensions, in elements

  explicit Rows(const torch::stable::Tensor& x) {
    const int64_t leading = x.dim() - 1;
    for (int64_t i = 0; i < leading; ++i) {
      size[3 - leading + i] = x.size(i);
      stride[3 - leading + i] = x.stride(i);
      num_rows *= x.size(i);
    }
  }

  // the first element of a row, counted from that of the tensor
  int64_t offset(int64_t row) const {
    return row / (size[1] * size[2]) * stride[0] + row / size[2] % size[1] * stride[1] +
           row % size[2] * stride[2];
  }
};

// A value of each row, [B] of any stride, or [], one for all.
template <class V>
struct PerRow {
  const V* data = nullptr;
  int64_t stride = 0;

  PerRow() = default;
  explicit PerRow(const torch::stable::Tensor& x)
      : data(static_cast<const V*>(x.data_ptr())), stride(x.dim() ? x.stride(0) : 0) {}
  explicit PerRow(const std::optional<torch::stable::Tensor>& x) : PerRow(x ? PerRow(*x) : PerRow()) {}

  V operator[](int64_t row) const { return data[row * stride]; }
};

// Calls run(token, first head, number of heads) for the heads [begin, end) of tokens that have num_heads
// each, counted through: all heads of a token at once where the range holds them.
template <class Run>
void for_head_runs(int64_t begin, int64_t end, int64_t num_heads, const Run& run) {
  while (begin < end) {
    const int64_t first = begin % num_heads, left = end - begin;
    const int64_t heads = num_heads - first < left ? num_heads - first : left;
    run(begin / num_heads, first, heads);
    begin += heads;
  }
}

}  // namespace lego
