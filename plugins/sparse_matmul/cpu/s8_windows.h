// Windows: the int8 product for many tokens that costs one step for every four stored weights of a column.
//
// Sixteen columns share a step. It names a window of 64 consecutive rows of W, and for each column up to four of the
// stored weights in it, wherever they are: one permutation of bytes (vpermb) takes the codes of x at those rows, one
// dot product (vpdpbusd) multiplies and sums them. A column that is ahead of the others waits only when it has no
// weight left in the window, so that most places of most steps are used: 0.87 with 70 % zeros, 0.67 with 90 %.
// Codes of x are kept as windows that overlap by half, so that each is one aligned vector.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "s8_dense.h"

namespace optimize::sparse_matmul {

// The lists of one strip of 64 columns, made on first use.
struct WindowLists {
  std::vector<WindowStep> steps;
  std::vector<uint16_t> places;  // window of each step, within its block
  std::vector<int64_t> begin;    // [blocks][4 groups] and the end
};

// In blocks of `block` windows.
WindowLists make_windows(const Weight& w, int64_t strip, int64_t block);

class Windows {
 public:
  Windows(const Weight& weight, const S8Dense& set, const int32_t* column_sums);

  // x [M, K] and y [M, N]. Throws std::bad_alloc only.
  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const;

 private:
  struct Chunk {
    int64_t M, tiles;
    const uint8_t* codes;  // per tile of tokens [windows][tokens][64]
    const float* steps;
    float* y;

    // Tiles have nearly equal numbers of tokens.
    int64_t first(int64_t tile) const { return M * tile / tiles; }
  };

  void run_chunk(const float* x, int64_t M, float* y, const Parallel& parallel) const;
  void run_strips(const Chunk& chunk, int64_t strip, int64_t strips_end, int64_t tile, int64_t tiles_end) const;

  Weight w_;
  const S8Dense& set_;
  const int32_t* column_sums_;
  int64_t windows_, blocks_, block_;  // windows of K, blocks, windows of a block
  mutable std::once_flag once_;
  mutable std::vector<WindowLists> lists_;
};

}  // namespace optimize::sparse_matmul
