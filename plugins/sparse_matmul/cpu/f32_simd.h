// The float32 kernels on the vectors of vec_<set>.h. Before including this, a file f32_<set>.cc includes that
// header and vec_math.h, and defines
//   expand_at(bits, v)     a vector with v[0], v[1] .. in the lanes whose bit is set and 0 elsewhere; may read
//                          kLanes floats from v
//   kColumns(tokens)       vectors of columns that are summed in registers for so many tokens
//   kTokens                most tokens summed at once
//   kRegisters             most vectors of tokens in a tile of pairs
#pragma once

#include <cstring>

#include "f32_kernels.h"

namespace optimize::sparse_matmul {
namespace {

constexpr int64_t kStripVectors = kTile / kLanes;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
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
      prefetch(v + 512);
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

// The same of a part of from with `rows` rows and `columns` columns, at most kLanes each; lanes from `rows` on are 0.
inline void transpose_part(const float* from, int64_t from_row, int64_t rows, int64_t columns, Vec* out) {
  if (rows >= kLanes && columns >= kLanes) return transpose(from, from_row, out);
  alignas(64) float part[kLanes * kLanes] = {};
  for (int64_t i = 0; i < rows; ++i) store(part + i * kLanes, load_first(from + i * from_row, columns));
  transpose(part, kLanes, out);
}

void transpose_x(const float* x, int64_t K, int64_t begin, int64_t end, int64_t tokens, int64_t stride, float* xt) {
  for (int64_t t = 0; t < tokens; t += kLanes)
    for (int64_t k = begin; k < end; k += kLanes) {
      const int64_t columns = min64(kLanes, end - k);
      Vec part[kLanes];
      transpose_part(x + t * K + k, K, min64(kLanes, tokens - t), columns, part);
      for (int64_t j = 0; j < columns; ++j) store(xt + (k + j) * stride + t, part[j]);
    }
}

template <int kT>
void pairs_of(const uint16_t* codes, const float* v, const char* xt, char* sums) {
  constexpr int64_t kBytes = sizeof(Vec);
  const auto at = [](const char* p, int64_t bytes) { return load(reinterpret_cast<const float*>(p + bytes)); };
  const auto put = [](char* p, int64_t bytes, Vec value) { store(reinterpret_cast<float*>(p + bytes), value); };
  for (int64_t left = *codes++; left > 0; --left) {
    char *sum_a = sums + codes[0], *sum_b = sums + codes[1];
    const uint16_t *both = codes + 4 + codes[2], *single = both + 2 * codes[3];
    codes += 4;
    Vec a[kT], b[kT];
    for (int t = 0; t < kT; ++t) a[t] = at(sum_a, t * kBytes), b[t] = at(sum_b, t * kBytes);
    for (; codes != both; ++codes, v += 2) {
      const char* x = xt + codes[0];
      const Vec wa = broadcast(v[0]), wb = broadcast(v[1]);
      for (int t = 0; t < kT; ++t) {
        const Vec column = at(x, t * kBytes);
        a[t] = fma(wa, column, a[t]);
        b[t] = fma(wb, column, b[t]);
      }
    }
    for (; codes != single; codes += 2, v += 2) {
      const char *xa = xt + codes[0], *xb = xt + codes[1];
      const Vec wa = broadcast(v[0]), wb = broadcast(v[1]);
      for (int t = 0; t < kT; ++t) a[t] = fma(wa, at(xa, t * kBytes), a[t]);
      for (int t = 0; t < kT; ++t) b[t] = fma(wb, at(xb, t * kBytes), b[t]);
    }
    for (int t = 0; t < kT; ++t) put(sum_a, t * kBytes, a[t]), put(sum_b, t * kBytes, b[t]);
  }
}

template <int kT = 1>
void pairs_by_width(const uint16_t* codes, const float* v, const char* xt, int64_t vectors, char* sums) {
  if constexpr (kT < kRegisters)
    if (vectors > kT) return pairs_by_width<kT + 1>(codes, v, xt, vectors, sums);
  pairs_of<kT>(codes, v, xt, sums);
}

void pairs(const uint16_t* codes, const float* values, const float* xt, int64_t vectors, float* sums) {
  pairs_by_width(codes, values, reinterpret_cast<const char*>(xt), vectors, reinterpret_cast<char*>(sums));
}

void finish_pairs(const Weight& w, int64_t strip, const float* sums, int64_t tokens, int64_t stride, float* y) {
  const int64_t columns = min64(kTile, w.N - strip * kTile);
  for (int64_t t = 0; t < tokens; t += kLanes)
    for (int64_t n = 0; n < columns; n += kLanes) {
      const int64_t rows = min64(kLanes, tokens - t), count = min64(kLanes, columns - n);
      const Vec bias = w.bias ? load_first(w.bias + strip * kTile + n, count) : zero();
      float* to = y + t * w.N + strip * kTile + n;
      Vec part[kLanes];
      transpose(sums + n * stride + t, stride, part);
      if (rows == kLanes && count == kLanes)
        for (int64_t m = 0; m < kLanes; ++m) store(to + m * w.N, activate(w.activation, add(part[m], bias)));
      else
        for (int64_t m = 0; m < rows; ++m) store_first(to + m * w.N, activate(w.activation, add(part[m], bias)), count);
    }
}

}  // namespace
}  // namespace optimize::sparse_matmul
