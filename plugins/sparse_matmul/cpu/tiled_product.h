// Runs TiledKernels (tiled.h) over all tokens and strips.
#pragma once

#include <mutex>
#include <vector>

#include "tiled.h"

namespace optimize::sparse_matmul {

// The lists of one strip, for each block one after the other.
struct StripLists {
  std::vector<uint16_t> codes;
  std::vector<uint32_t> values;                  // bits of 32-bit elements
  std::vector<int64_t> code_begin, value_begin;  // [blocks]

  void begin_block() {
    code_begin.push_back(static_cast<int64_t>(codes.size()));
    value_begin.push_back(static_cast<int64_t>(values.size()));
  }
};

// Stored weights per place of W.
double density_of(const Weight& weight);

class TiledProduct {
 public:
  using Make = StripLists (*)(const Weight& w, int64_t strip, TileShape shape);

  // `rows` of X^T; make is called once for each strip, on the first run.
  TiledProduct(const Weight& weight, const TiledKernels& kernels, TileShape shape, int64_t rows, Make make)
      : w_(weight), kernels_(kernels), shape_(shape), rows_(rows), make_(make) {}

  // x [M][rows], y [M, N], steps [M] or null. Throws std::bad_alloc only.
  void run(const void* x, const float* steps, int64_t M, float* y, const Parallel& parallel) const;

 private:
  struct TokenTile {
    int64_t first, tokens, vectors;
  };

  void make_lists(const Parallel& parallel) const;
  TokenTile tile_of(int64_t tokens, int64_t tiles, int64_t i) const;
  void run_chunk(const char* x, const float* steps, int64_t tokens, float* y, const Parallel& parallel) const;
  void strip_of(int64_t strip, const float* xt, const TokenTile& tile, const float* steps, float* y) const;

  Weight w_;
  const TiledKernels& kernels_;
  TileShape shape_;
  int64_t rows_;
  Make make_;
  mutable std::once_flag once_;
  mutable std::vector<StripLists> lists_;
};

}  // namespace optimize::sparse_matmul
