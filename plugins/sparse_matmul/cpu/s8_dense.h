// What s8_avx512.cc and s8_amx.cc offer to s8_dense.cc: a strip of 64 columns is read as it is stored and multiplied
// densely. Plain structs and pointers only: see CMakeLists.txt.
#pragma once

#include <cstdint>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {

constexpr int64_t kSmallTokens = 8;  // most tokens of one call of S8Dense::small

// int8 codes of tokens: `rows` of `stride` bytes, zeros from K up to the next multiple of 64.
struct Codes {
  const int8_t* data;
  int64_t stride;
  const float* steps;  // value of one step of each token
};

struct S8Dense {
  // Codes of one token and zeros up to the next multiple of 64; returns the value of one step.
  float (*quantize)(const float* x, int64_t K, const float* x_scale, int8_t* codes);
  // Sums of the weights of the strip's 64 columns.
  void (*column_sums)(const Weight& w, int64_t strip, int32_t* sums);
  // y [M, N] of the strip's columns, M <= kSmallTokens, while the weights are read.
  void (*small)(const Weight& w, int64_t strip, const int32_t* column_sums, Codes codes, int64_t M, float* y);
  // The strip's weights as bytes, dense [2, tiles_k, 16 (k / 4), 2, 16 (columns), 4 (k % 4)], aligned to 64: halves of 32
  // columns, so that one half of many rows fits in the first cache.
  void (*expand)(const Weight& w, int64_t strip, int8_t* dense);
  // y of the strip's columns. The rows of `codes` go on with zeros up to the next multiple of 16. `sums` has room for
  // 32 int32 for each of those rows.
  void (*large)(const Weight& w, int64_t strip, const int8_t* dense, const int32_t* column_sums, Codes codes, int64_t M,
                int32_t* sums, float* y);
};

const S8Dense* s8_avx512();  // defined on x86-64
const S8Dense* s8_amx();     // the same with a `large` of its own

}  // namespace optimize::sparse_matmul
