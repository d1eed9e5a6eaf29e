// The int8 kernels that AVX2 and NEON share. A tile is expanded to bytes once and multiplied with every token of
// the call. Before including this, a file s8_<set>.cc includes vec_<set>.h and vec_math.h, and defines
//   Code, Sums                             types of a code of x and of kSums sums of one token and 64 columns
//   expand_tile(bitmap, values, dense)     dense [4096] in order of position; may read 16 bytes after the last value
//   dot_tile(dense, codes, row, M, sums)   sums [M] += dense * codes [M][row]
//   columns_of(sums, n)                    the sums of columns n .. n + kLanes as floats
#pragma once

#include <cstring>

#include "s8_portable.h"

namespace optimize::sparse_matmul {
namespace {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

void expand(const Weight& w, int64_t strip, const void* codes, const float* steps, int64_t M, float* y) {
  alignas(64) Sums sums[kS8Tokens];
  std::memset(sums, 0, sizeof sums);
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt, begin = w.offsets[tile];
    if (w.offsets[tile + 1] == begin) continue;
    constexpr int64_t kAfter = 16;
    const int8_t* values = static_cast<const int8_t*>(w.values) + begin;
    alignas(64) int8_t dense[kTile * kTile], copy[kTile * kTile + kAfter];
    if (w.offsets[tile + 1] + kAfter > w.num_values) {  // reading past the last value would leave the array
      std::memcpy(copy, values, static_cast<size_t>(min64(w.num_values - begin, kTile * kTile)));
      values = copy;
    }
    expand_tile(w.bitmap + tile * kBitmapBytes, values, dense);
    dot_tile(dense, static_cast<const Code*>(codes) + kt * kTile, tiles_k * kTile, M, sums);
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < kTile; n += kLanes) {
      const int64_t column = strip * kTile + n, count = min64(kLanes, w.N - column);
      if (count <= 0) break;
      Vec v = mul(columns_of(sums[m], n), mul(load_first(w.scale + column, count), broadcast(steps[m])));
      if (w.bias) v = add(v, load_first(w.bias + column, count));
      store_first(y + m * w.N + column, activate(w.activation, v), count);
    }
}

}  // namespace
}  // namespace optimize::sparse_matmul
