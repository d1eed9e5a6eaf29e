// The float32 kernels on the vectors of vec_<set>.h. Before including this, a file f32_<set>.cc includes that
// header and vec_math.h, and defines
//   expand_at(bits, v)     a vector with v[0], v[1] .. in the lanes whose bit is set and 0 elsewhere; may read
//                          kLanes floats from v
//   kColumns(tokens)       vectors of columns that are summed in registers for so many tokens
//   kTokens                most tokens summed at once
//   kRegisters, kScaled    most vectors of tokens in a tile of pairs, TileShape.scaled
#pragma once

#include <cstring>

#include "f32_kernels.h"
#include "tiled_simd.h"

namespace optimize::sparse_matmul {
namespace {

constexpr int64_t kStripVectors = kTile / kLanes;

inline int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

// acc [tokens][64] += x rows of one tile. v must have kTile floats after the tile's last value.
template <int kM, int kC>
void expand_tile(const uint8_t* bitmap, const float* values, int64_t rows, const float* x, int64_t K, float* acc) {
  for (int64_t part = 0; part < kStripVectors; part += kC) {
    Vec sum[kM][kC];
    for (int m = 0; m < kM; ++m)
      for (int c = 0; c < kC; ++c) sum[m][c] = load(acc + m * kTile + (part + c) * kLanes);
    const float* v = values;
    for (int64_t k = 0; k < rows; ++k) {
      uint64_t word;
      std::memcpy(&word, bitmap + k * 8, 8);
      Vec w[kC];
      for (int c = 0; c < kC; ++c) {
        const int64_t shift = (part + c) * kLanes;
        const uint64_t before = word & ((uint64_t{1} << shift) - 1);
        w[c] = expand_at(word >> shift, v + __builtin_popcountll(before));
      }
      v += __builtin_popcountll(word);
      prefetch(v + 512), prefetch(v + 528);  // half of the weights of a row are two cache lines
      for (int m = 0; m < kM; ++m) {
        const Vec factor = broadcast(x[m * K + k]);
        for (int c = 0; c < kC; ++c) sum[m][c] = fma(factor, w[c], sum[m][c]);
      }
    }
    for (int m = 0; m < kM; ++m)
      for (int c = 0; c < kC; ++c) store(acc + m * kTile + (part + c) * kLanes, sum[m][c]);
  }
}

template <int kM = 1>
void expand_tokens(int64_t tokens, const uint8_t* bitmap, const float* values, int64_t rows, const float* x, int64_t K,
                   float* acc) {
  if constexpr (kM < kTokens)
    if (tokens > kM) return expand_tokens<kM + 1>(tokens, bitmap, values, rows, x, K, acc);
  expand_tile<kM, kColumns(kM)>(bitmap, values, rows, x, K, acc);
}

void expand(const Weight& w, int64_t strip, const float* x, int64_t M, float* y) {
  alignas(64) float acc[kExpandTokens * kTile];
  std::memset(acc, 0, static_cast<size_t>(M * kTile) * sizeof(float));
  const int64_t groups = (M + kTokens - 1) / kTokens, tiles_k = tiles_of(w.K);
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt, begin = w.offsets[tile];
    if (w.offsets[tile + 1] == begin) continue;
    const float* values = static_cast<const float*>(w.values) + begin;
    alignas(64) float copy[kTile * kTile + kTile];
    if (w.offsets[tile + 1] + kTile > w.num_values) {  // reading past the last value would leave the array
      const int64_t count = min64(w.num_values - begin, kTile * kTile);
      std::memcpy(copy, values, static_cast<size_t>(count) * sizeof(float));
      values = copy;
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t m = M * g / groups, tokens = M * (g + 1) / groups - m;
      expand_tokens(tokens, w.bitmap + tile * kBitmapBytes, values, min64(kTile, w.K - kt * kTile),
                    x + m * w.K + kt * kTile, w.K, acc + m * kTile);
    }
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t c = 0; c < kTile; c += kLanes) {
      const int64_t column = strip * kTile + c, count = min64(kLanes, w.N - column);
      if (count <= 0) break;
      Vec v = load(acc + m * kTile + c);
      if (w.bias) v = add(v, load_first(w.bias + column, count));
      store_first(y + m * w.N + column, activate(w.activation, v), count);
    }
}

inline Vec broadcast_bits(const uint32_t* v) {
  float value;
  std::memcpy(&value, v, sizeof value);
  return broadcast(value);
}

template <int kT>
void pairs_of(const uint16_t* codes, const uint32_t* v, const char* xt, char* sums) {
  constexpr int64_t kBytes = sizeof(Vec), kScale = kScaled ? kT : 1;
  const auto at = [](const char* p, int64_t bytes) { return load(reinterpret_cast<const float*>(p + bytes)); };
  const auto put = [](char* p, int64_t bytes, Vec value) { store(reinterpret_cast<float*>(p + bytes), value); };
  for (int64_t left = *codes++; left > 0; --left) {
    char *sum_a = sums + codes[0] * kScale, *sum_b = sums + codes[1] * kScale;
    const uint16_t *both = codes + 4 + codes[2], *single = both + 2 * codes[3];
    codes += 4;
    Vec a[kT], b[kT];
    for (int t = 0; t < kT; ++t) a[t] = at(sum_a, t * kBytes), b[t] = at(sum_b, t * kBytes);
    for (; codes != both; ++codes, v += 2) {
      const char* x = xt + codes[0] * kScale;
      const Vec wa = broadcast_bits(v), wb = broadcast_bits(v + 1);
      for (int t = 0; t < kT; ++t) {
        const Vec column = at(x, t * kBytes);
        a[t] = fma(wa, column, a[t]);
        b[t] = fma(wb, column, b[t]);
      }
    }
    for (; codes != single; codes += 2, v += 2) {
      const char *xa = xt + codes[0] * kScale, *xb = xt + codes[1] * kScale;
      const Vec wa = broadcast_bits(v), wb = broadcast_bits(v + 1);
      for (int t = 0; t < kT; ++t) a[t] = fma(wa, at(xa, t * kBytes), a[t]);
      for (int t = 0; t < kT; ++t) b[t] = fma(wb, at(xb, t * kBytes), b[t]);
    }
    for (int t = 0; t < kT; ++t) put(sum_a, t * kBytes, a[t]), put(sum_b, t * kBytes, b[t]);
  }
}

template <int kT = 1>
void pairs_by_width(const uint16_t* codes, const uint32_t* v, const char* xt, int64_t vectors, char* sums) {
  if constexpr (kT < kRegisters)
    if (vectors > kT) return pairs_by_width<kT + 1>(codes, v, xt, vectors, sums);
  pairs_of<kT>(codes, v, xt, sums);
}

void pairs(const uint16_t* codes, const uint32_t* values, const void* xt, int64_t vectors, void* sums) {
  pairs_by_width(codes, values, static_cast<const char*>(xt), vectors, static_cast<char*>(sums));
}

void finish_pairs(const Weight& w, int64_t strip, const void* sums, const float*, int64_t tokens, int64_t stride,
                  float* y) {
  const int64_t first = strip * kTile;
  finish_columns(sums, min64(kTile, w.N - first), tokens, stride, [&](Vec v, int64_t m, int64_t n, int64_t count) {
    if (w.bias) v = add(v, load_first(w.bias + first + n, count));
    store_columns(y + m * w.N + first + n, activate(w.activation, v), count);
  });
}

constexpr TiledKernels kPairs{transpose_elements, pairs, finish_pairs};

}  // namespace
}  // namespace optimize::sparse_matmul
