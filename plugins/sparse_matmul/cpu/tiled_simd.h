// Transposes of TiledKernels on the vectors of vec_<set>.h, which is included before.
#pragma once

#include "tiled.h"

namespace optimize::sparse_matmul {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// out[j][i] = from[i * from_row + j] for i < rows and j < columns, at most kLanes each; lanes from `rows` on are 0.
inline void transpose_part(const float* from, int64_t from_row, int64_t rows, int64_t columns, Vec* out) {
  if (rows >= kLanes && columns >= kLanes) return transpose(from, from_row, out);
  alignas(64) float part[kLanes * kLanes] = {};
  for (int64_t i = 0; i < rows; ++i) store(part + i * kLanes, load_first(from + i * from_row, columns));
  transpose(part, kLanes, out);
}

void transpose_elements(const void* x, int64_t rows, int64_t begin, int64_t end, int64_t tokens, int64_t stride,
                        void* xt) {
  const float* from = static_cast<const float*>(x);
  float* to = static_cast<float*>(xt);
  for (int64_t t = 0; t < tokens; t += kLanes)
    for (int64_t k = begin; k < end; k += kLanes) {
      const int64_t columns = min64(kLanes, end - k);
      Vec part[kLanes];
      transpose_part(from + t * rows + k, rows, min64(kLanes, tokens - t), columns, part);
      for (int64_t j = 0; j < columns; ++j) store(to + (k + j) * stride + t, part[j]);
    }
}

// Calls finish(v, m, n, count) with v the sums of columns n .. n + count of token m.
template <typename Finish>
void finish_columns(const void* sums, int64_t columns, int64_t tokens, int64_t stride, const Finish& finish) {
  for (int64_t t = 0; t < tokens; t += kLanes)
    for (int64_t n = 0; n < columns; n += kLanes) {
      const int64_t rows = min64(kLanes, tokens - t), count = min64(kLanes, columns - n);
      Vec part[kLanes];
      transpose(static_cast<const float*>(sums) + n * stride + t, stride, part);
      if (rows == kLanes && count == kLanes)
        for (int64_t m = 0; m < kLanes; ++m) finish(part[m], t + m, n, kLanes);
      else
        for (int64_t m = 0; m < rows; ++m) finish(part[m], t + m, n, count);
    }
}

inline void store_columns(float* y, Vec v, int64_t count) {
  if (count == kLanes)
    store(y, v);
  else
    store_first(y, v, count);
}

}  // namespace
}  // namespace optimize::sparse_matmul
