// Products for many tokens: tokens in the lanes of vectors, weights as lists. float32 and the portable int8 kernels
// share how x is transposed, how work is cut into tasks, and how lists are made on first use.
//
// X^T has `rows` rows of one 32-bit element per token: a float, or as many codes of x as fit (two int16, four int8).
// Tokens are cut into tiles of at most `stride` tokens and rows into blocks, so that a block of a tile's X^T stays
// in the first-level cache while the lists of a strip (64 columns) are applied to it.
#pragma once

#include <cstdint>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {

struct TileShape {
  int64_t stride;  // elements of a row of X^T or of the sums: the most tokens of a tile
  int64_t block;   // rows of a block; block * stride * 4 <= 2^16
};

// Of one instruction set and type. Plain pointers only: see CMakeLists.txt.
struct TiledKernels {
  int64_t lanes;  // elements of a vector
  // xt [..][stride] = rows begin .. end of the transpose of x [tokens][rows]; lanes of the last vector after them
  // are 0.
  void (*transpose)(const void* x, int64_t rows, int64_t begin, int64_t end, int64_t tokens, int64_t stride, void* xt);
  // sums [64][stride] += one block of a strip's lists, for the first `vectors` vectors of tokens.
  void (*apply)(const uint16_t* codes, const uint32_t* values, const void* xt, int64_t vectors, void* sums);
  // y of the strip's columns = activation(sums * scale * steps + bias); scale and steps of int8 only.
  void (*finish)(const Weight& w, int64_t strip, const void* sums, const float* steps, int64_t tokens, int64_t stride,
                 float* y);
};

}  // namespace optimize::sparse_matmul
