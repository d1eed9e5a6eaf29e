// The two forms of a float32 weight that are derived on first use; f32_kernels.h describes them.
#pragma once

#include <vector>

#include "f32_kernels.h"
#include "tiled_product.h"

namespace optimize::sparse_matmul {

StripLists make_pairs(const Weight& w, int64_t strip, TileShape shape);

struct OwnedSlices {
  std::vector<int64_t> steps;
  std::vector<uint8_t> columns;
  std::vector<uint16_t> rows;
  std::vector<float> values;
};
// Needs K <= 65536.
OwnedSlices make_slices(const Weight& w, int64_t lanes);

}  // namespace optimize::sparse_matmul
