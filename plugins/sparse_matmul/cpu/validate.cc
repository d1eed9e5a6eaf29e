#include <cmath>
#include <cstring>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {
namespace {

// (k, n) of a position in its tile.
void place(Layout layout, int64_t p, int64_t& k, int64_t& n) {
  if (layout == Layout::n64k1) {
    k = p / kTile;
    n = p % kTile;
  } else {
    k = p / 256 * 4 + p % 4;
    n = p % 256 / 64 * 16 + p % 64 / 4;
  }
}

int64_t count_bits(const uint8_t* bytes) {
  int64_t total = 0;
  for (int64_t i = 0; i < kBitmapBytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    total += __builtin_popcountll(word);
  }
  return total;
}

bool bits_inside(const Weight& w, int64_t tile) {
  const int64_t rows = w.K - tile % w.tiles_k() * kTile, columns = w.N - tile / w.tiles_k() * kTile;
  if (rows >= kTile && columns >= kTile) return true;
  for (int64_t p = 0; p < kTile * kTile; ++p) {
    if (!(w.bitmap[tile * kBitmapBytes + p / 8] >> (p % 8) & 1)) continue;
    int64_t k, n;
    place(w.layout, p, k, n);
    if (k >= rows || n >= columns) return false;
  }
  return true;
}

std::string expected(const char* what, int64_t found, int64_t wanted) {
  return std::string(what) + ": found " + std::to_string(found) + ", expected " + std::to_string(wanted);
}

}  // namespace

std::string validate(const Weight& w, int64_t bitmap_bytes, int64_t num_offsets) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (w.K < 1 || w.N < 1 || w.K >= kLimit || w.N >= kLimit)
    return "K and N must be between 1 and 2^31 - 1, found " + std::to_string(w.K) + " and " + std::to_string(w.N);
  const int64_t tiles = w.tiles();
  if (bitmap_bytes / kBitmapBytes != tiles || bitmap_bytes % kBitmapBytes)
    return expected("bytes of the bitmap", bitmap_bytes, tiles * kBitmapBytes);
  if (num_offsets != tiles + 1) return expected("number of offsets", num_offsets, tiles + 1);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = w.offsets[t], bits = count_bits(w.bitmap + t * kBitmapBytes);
    if (begin < 0 || begin + bits > w.offsets[t + 1] || w.offsets[t + 1] > w.num_values)
      return "tile " + std::to_string(t) + " has " + std::to_string(bits) + " set bits, its values are " +
             std::to_string(begin) + " to " + std::to_string(w.offsets[t + 1]) + " of " + std::to_string(w.num_values);
    if (!bits_inside(w, t)) return "tile " + std::to_string(t) + " has set bits outside of K x N";
  }
  if (w.layout == Layout::n16k4) {
    if (w.scale == nullptr) return "int8 values need a scale of N numbers";
    // 255 * 127 * K must stay below 2^31
    if (w.K > 66311) return expected("K, so that sums of int8 products fit in int32, at most", w.K, 66311);
    for (int64_t n = 0; n < w.N; ++n)
      if (!std::isfinite(w.scale[n]) || w.scale[n] < 0)
        return "scale " + std::to_string(n) + " is negative or not finite";
    if (w.x_scale && !(std::isfinite(*w.x_scale) && *w.x_scale > 0))
      return "x_scale must be positive and finite, found " + std::to_string(*w.x_scale);
  }
  return {};
}

}  // namespace optimize::sparse_matmul
