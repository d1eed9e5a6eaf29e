// The slices kernel, for instruction sets with a gather: gather(rows, x) is x[rows[i]] in lane i.
#pragma once

#include "f32_simd.h"

namespace optimize::sparse_matmul {
namespace {

void slices(const Weight& w, const Slices& s, int64_t strip, const float* x, float* y) {
  const int64_t columns = min64(kTile, w.N - strip * kTile), first = strip * kStripVectors;
  alignas(64) float sums[kTile];
  for (int64_t i = first; i < first + (columns + kLanes - 1) / kLanes; ++i) {
    Vec a = zero(), b = zero();
    int64_t p = s.steps[i] * kLanes;
    const int64_t end = s.steps[i + 1] * kLanes;
    for (; p + kLanes < end; p += 2 * kLanes) {
      a = fma(load(s.values + p), gather(s.rows + p, x), a);
      b = fma(load(s.values + p + kLanes), gather(s.rows + p + kLanes, x), b);
    }
    if (p < end) a = fma(load(s.values + p), gather(s.rows + p, x), a);
    alignas(64) float sum[kLanes];
    store(sum, add(a, b));
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[s.columns[i * kLanes + lane]] = sum[lane];
  }
  for (int64_t n = 0; n < columns; n += kLanes) {
    const int64_t column = strip * kTile + n, inside = min64(kLanes, columns - n);
    Vec v = load(sums + n);
    if (w.bias) v = add(v, load_first(w.bias + column, inside));
    store_first(y + column, activate(w.activation, v), inside);
  }
}

}  // namespace
}  // namespace optimize::sparse_matmul
