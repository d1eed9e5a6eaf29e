// The int8 kernels that AVX2 and NEON share. A tile is expanded to bytes once and multiplied with every token of
// the call. Before including this, a file s8_<set>.cc includes vec_<set>.h and vec_math.h, and defines
//   Code, Sums                             types of a code of x and of kSums sums of one token and 64 columns
//   expand_tile(bitmap, values, dense)     dense [4096] in order of position; may read 16 bytes after the last value
//   dot_tile(dense, codes, row, M, sums)   sums [M] += dense * codes [M][row]
//   columns_of(sums, n)                    the sums of columns n .. n + kLanes as floats
//   Integers, load_integers(p), store_integers(p, v), broadcast_integers(bits)   vectors of 32-bit elements
//   dot(w, x, sum)                         sum + the products of the codes in each element
//   kRegisters, kBlock                     vectors of tokens and elements in a tile of groups
#pragma once

#include <cstring>

#include "s8_portable.h"
#include "tiled_simd.h"

namespace optimize::sparse_matmul {
namespace {

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
      Vec v = mul(mul(columns_of(sums[m], n), broadcast(steps[m])), load_first(w.scale + column, count));
      if (w.bias) v = add(v, load_first(w.bias + column, count));
      store_first(y + m * w.N + column, activate(w.activation, v), count);
    }
}

template <int kT>
void groups_of(const uint16_t* codes, const uint32_t* v, const char* xt, char* sums) {
  constexpr int64_t kBytes = sizeof(Integers);
  for (int64_t left = *codes++; left > 0; --left) {
    char* to = sums + codes[0];
    const uint16_t* end = codes + 2 + codes[1];
    codes += 2;
    Integers sum[kT];
    for (int t = 0; t < kT; ++t) sum[t] = load_integers(to + t * kBytes);
    for (; codes != end; ++codes, ++v) {
      const char* x = xt + codes[0];
      const Integers w = broadcast_integers(*v);
      for (int t = 0; t < kT; ++t) sum[t] = dot(w, load_integers(x + t * kBytes), sum[t]);
    }
    for (int t = 0; t < kT; ++t) store_integers(to + t * kBytes, sum[t]);
  }
}

template <int kT = 1>
void groups_by_width(const uint16_t* codes, const uint32_t* v, const char* xt, int64_t vectors, char* sums) {
  if constexpr (kT < kRegisters)
    if (vectors > kT) return groups_by_width<kT + 1>(codes, v, xt, vectors, sums);
  groups_of<kT>(codes, v, xt, sums);
}

void groups(const uint16_t* codes, const uint32_t* values, const void* xt, int64_t vectors, void* sums) {
  groups_by_width(codes, values, static_cast<const char*>(xt), vectors, static_cast<char*>(sums));
}

void finish_groups(const Weight& w, int64_t strip, const void* sums, const float* steps, int64_t tokens, int64_t stride,
                   float* y) {
  const int64_t first = strip * kTile;
  finish_columns(sums, min64(kTile, w.N - first), tokens, stride, [&](Vec v, int64_t m, int64_t n, int64_t count) {
    v = mul(mul(from_integers(v), broadcast(steps[m])), load_first(w.scale + first + n, count));
    if (w.bias) v = add(v, load_first(w.bias + first + n, count));
    store_columns(y + m * w.N + first + n, activate(w.activation, v), count);
  });
}

constexpr S8Kernels kKernels{
    sizeof(Code), {kLanes, kRegisters, kBlock, false}, {transpose_elements, groups, finish_groups}, quantize, expand};

}  // namespace
}  // namespace optimize::sparse_matmul
