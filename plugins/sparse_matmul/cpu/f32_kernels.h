// What the file of one instruction set (f32_<set>.cc) offers to f32.cc, and the two forms that are derived from
// the stored weight on first use. Plain structs and pointers only: see the warning in CMakeLists.txt.
//
// expand   The bitmap form as it is stored: each row of a tile is expanded to registers and multiplied by the
//          token's x[k]. Reads the fewest bytes: for few tokens.
// pairs    Tokens in the lanes of up to `registers` vectors, X transposed to [K][tokens]. Columns are taken in
//          pairs, and a non-zero weight costs one multiply-add per vector: for many tokens.
// slices   One token; columns in lanes, each lane gathers its x[k] (the SELL-C-sigma form of Kreutzer et al.,
//          "A unified sparse matrix data format", 2014): for very sparse weights.
#pragma once

#include <cstdint>

#include "tiled.h"

namespace optimize::sparse_matmul {

constexpr int64_t kExpandTokens = 32;  // most tokens of one call of expand

// Lists of pairs (tiled.h): the columns of one strip in one block of rows, two by two.
//   codes    number of pairs; then per pair: column a, column b, n_both, n_single, then n_both rows and n_single
//            times (row of a, row of b). Columns count within the strip and rows within the block.
//   values   per row of `both` the weights of a and b; per single row of a its weight, and of b.
// Where a and b have unequal numbers of single rows, weights of the shorter are halved and stand twice.

// Slices of `lanes` columns of one strip with similar numbers of weights. Slice s has steps[s] .. steps[s + 1] steps,
// each of `lanes` rows (uint16) and values, one per column; columns[s * lanes + lane] is the column in its strip.
struct Slices {
  int64_t lanes = 0;
  const int64_t* steps = nullptr;
  const uint8_t* columns = nullptr;
  const uint16_t* rows = nullptr;
  const float* values = nullptr;
};

struct F32Kernels {
  int64_t lanes;                         // floats of one vector
  TileShape (*shape)(double density);    // of tiles for pairs
  double pairs_from, pairs_per_density;  // pairs for M >= pairs_from + pairs_per_density * density, measured
  TiledKernels pairs;
  // y of the strip's columns for M <= kExpandTokens tokens.
  void (*expand)(const Weight& w, int64_t strip, const float* x, int64_t M, float* y);
  // y of the strip's columns for one token; null where the machine has no gather.
  void (*slices)(const Weight& w, const Slices& slices, int64_t strip, const float* x, float* y);
};

const F32Kernels* f32_avx512();  // defined where CMake builds for that processor
const F32Kernels* f32_avx2();
const F32Kernels* f32_neon();

}  // namespace optimize::sparse_matmul
