// Products for many tokens: tokens in the lanes of vectors, weights as lists. float32 and the portable int8 kernels
// share how x is transposed, how work is cut into tasks, and how lists are made on first use.
//
// X^T has `rows` rows of one 32-bit element per token: a float, or as many codes of x as fit (two int16, four int8).
// Tokens are cut into tiles of some vectors and rows into blocks, so that a block of a tile's X^T stays in the
// first-level cache while the lists of a strip (64 columns) are applied to it. Lists name a row of X^T, or of the
// sums [64], by a byte offset: its place if rows are as long as the largest tile's, or (`scaled`) one vector long.
#pragma once

#include <cstdint>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {

struct TileShape {
  int64_t lanes;    // elements of a vector
  int64_t vectors;  // most vectors of a tile
  int64_t block;    // rows of a block; offsets in it must stay below 2^16
  bool scaled;      // a tile's rows have its own length and kernels multiply offsets by it, free of cost on x86
                    // for 1, 2, 4 and 8 vectors; else all rows have the length of the largest tile's

  int64_t stride(int64_t tile_vectors) const { return (scaled ? tile_vectors : vectors) * lanes; }
  int64_t offset(int64_t row) const { return row * stride(1) * 4; }
};

// Of one instruction set and type. Plain pointers only: see CMakeLists.txt.
struct TiledKernels {
  // xt [..][stride] = rows begin .. end of the transpose of x [tokens][rows]; lanes of the last vector after them
  // are 0.
  void (*transpose)(const void* x, int64_t rows, int64_t begin, int64_t end, int64_t tokens, int64_t stride, void* xt);
  // sums [64][stride] += one block of a strip's lists.
  void (*apply)(const uint16_t* codes, const uint32_t* values, const void* xt, int64_t vectors, void* sums);
  // y of the strip's columns = activation(sums * steps * scale + bias); scale and steps of int8 only.
  void (*finish)(const Weight& w, int64_t strip, const void* sums, const float* steps, int64_t tokens, int64_t stride,
                 float* y);
};

}  // namespace optimize::sparse_matmul
