// What s8_avx2.cc and s8_neon.cc offer to s8_portable.cc. Plain structs and pointers only: see CMakeLists.txt.
#pragma once

#include <cstdint>

#include "tiled.h"

namespace optimize::sparse_matmul {

constexpr int64_t kS8Tokens = 24;  // most tokens of one call of S8Kernels::expand

// Lists of groups (tiled.h): codes begin with the number of columns; then follow, for each, its byte offset in the
// sums, the number of its elements and their byte offsets in X^T. values has one element for each of those: the
// weights of as many k as an element has codes, not all of which are 0.
struct S8Kernels {
  int64_t code_bytes;  // of one code of x: 2 or 1, so that an element of X^T is 2 or 4 codes
  TileShape shape;     // of tiles for groups; shape.block elements are whole tiles of W
  TiledKernels groups;

  // Codes of one token, then zeros up to the next multiple of 64; returns the value of one step.
  float (*quantize)(const float* x, int64_t K, const float* x_scale, void* codes);
  // y of the strip's columns; codes [M][K rounded up to 64], steps [M], M <= kS8Tokens.
  void (*expand)(const Weight& w, int64_t strip, const void* codes, const float* steps, int64_t M, float* y);
};

const S8Kernels* s8_avx2();  // defined where CMake builds for that processor
const S8Kernels* s8_neon();

}  // namespace optimize::sparse_matmul
