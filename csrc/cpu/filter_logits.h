#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

namespace lego {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// -inf for logits below the k-th largest; ties of that one stay.
inline void keep_top_k(float* logits, int64_t V, int64_t k, std::vector<float>& scratch) {
  if (k <= 0 || k >= V) return;
  scratch.assign(logits, logits + V);
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
  const float least = scratch[k - 1];
  for (int64_t i = 0; i < V; ++i) {
    if (logits[i] < least) logits[i] = kNever;
  }
}

// The likelihood of a token against the likeliest, and its index less than 0, so that of equals the first
// comes first.
using LikelyFirst = std::vector<std::pair<double, int64_t>>;

// -inf for tokens outside the smallest set of the most likely ones whose probability reaches p. The first of
// all stays whatever p is.
inline void keep_top_p(float* logits, int64_t V, double p, double temperature, LikelyFirst& heap) {
  const double most = *std::max_element(logits, logits + V);
  if (p >= 1 || std::isinf(most)) return;
  double total = 0;
  heap.clear();
  for (int64_t i = 0; i < V; ++i) {
    if (logits[i] == kNever) continue;
    const double likely = std::exp((logits[i] - most) / temperature);
    total += likely;
    heap.emplace_back(likely, -i);
  }
  std::make_heap(heap.begin(), heap.end());
  double reached = 0;
  auto end = heap.end();
  while (reached < p * total && end != heap.begin()) {
    reached += heap.front().first;
    std::pop_heap(heap.begin(), end--);
  }
  // what is left of the heap is not kept
  for (auto dropped = heap.begin(); dropped != end; ++dropped) logits[-dropped->second] = kNever;
}

}  // namespace lego
