// What s8_avx512.cc and s8_amx.cc offer to s8_dense.cc: a strip of 64 columns is read as it is stored and multiplied
// densely. Plain structs and pointers only: see CMakeLists.txt.
#pragma once

#include <cstdint>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {

constexpr int64_t kSmallTokens = 8;  // most tokens of one call of S8Dense::small

// s8_windows.h describes these.
constexpr int64_t kWindowStep = 32;    // rows between the beginnings of two windows, which are 64 long
constexpr int64_t kWindowTokens = 26;  // most tokens of one call of S8Dense::window_sums
struct alignas(64) WindowStep {
  uint8_t rows[64];    // [16 columns][4], within the window
  int8_t weights[64];  // 0 where there is none
};

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

  // Codes of one token to windows [windows][tokens][64] of a tile of tokens, as bytes 0 .. 255; `to` is the token's first.
  void (*spread)(const int8_t* codes, int64_t windows, int64_t tokens, uint8_t* to);
  // sums [tokens][64] of 16 columns, set (first) or increased by `count` steps. `block` is the first window of the block
  // in [windows][tokens][64].
  void (*window_sums)(const WindowStep* steps, const uint16_t* places, int64_t count, const uint8_t* block,
                      int64_t tokens, bool first, int32_t* sums);
  // y of the strip's columns from sums [tokens][64] of products with bytes 0 .. 255.
  void (*finish)(const Weight& w, int64_t strip, const int32_t* column_sums, const int32_t* sums, const float* steps,
                 int64_t tokens, float* y);
};

const S8Dense* s8_avx512();  // defined on x86-64
const S8Dense* s8_amx();     // the same with a `large` of its own

}  // namespace optimize::sparse_matmul
