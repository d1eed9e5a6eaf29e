// Checks of a weight, on the host. Plain C++.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int64_t kTile = 64, kBitmapBytes = 512, kValues24 = kTile * kTile / 2;

std::string expected(const std::string& what, int64_t found, int64_t wanted) {
  return what + ": found " + std::to_string(found) + ", expected " + std::to_string(wanted);
}

uint64_t word_at(const uint8_t* bytes, int64_t i) {
  uint64_t word;
  std::memcpy(&word, bytes + i * 8, 8);
  return word;
}

// [nb 4][kb 4][h 2][g 8][t 4][e 4], as decode.cu says.
bool bits_inside(const uint8_t* bitmap, int64_t rows, int64_t columns) {
  if (rows >= kTile && columns >= kTile) return true;
  for (int64_t p = 0; p < kTile * kTile; ++p) {
    if (!(bitmap[p / 8] >> (p % 8) & 1)) continue;
    const int64_t k = p / 4 % 4 * 16 + p / 256 % 4 * 4 + p % 4, n = p / 1024 * 16 + p / 128 % 2 * 8 + p / 16 % 8;
    if (k >= rows || n >= columns) return false;
  }
  return true;
}

std::string check_bitmap(const Weight& w, int64_t tiles_k, int64_t tiles, int64_t num_values) {
  const int64_t unit = w.layout == Layout::mma8 ? 16 : 8;  // values of 16 bytes
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = w.offsets[t], end = w.offsets[t + 1];
    const std::string tile = "tile " + std::to_string(t);
    const uint8_t* bitmap = w.bitmap + t * kBitmapBytes;
    int64_t bits = 0;
    for (int64_t i = 0; i < kBitmapBytes / 8; ++i) bits += __builtin_popcountll(word_at(bitmap, i));
    if (begin < 0 || begin + bits > end || end > num_values)
      return tile + " has " + std::to_string(bits) + " set bits, its values are " + std::to_string(begin) + " to " +
             std::to_string(end) + " of " + std::to_string(num_values);
    if (begin % unit || end % unit)
      return tile + ": its values are " + std::to_string(begin) + " to " + std::to_string(end) +
             ", expected multiples of " + std::to_string(unit);
    if (end - begin > kTile * kTile)
      return tile + " has room for " + std::to_string(end - begin) + " values, expected at most 4096";
    if (w.most_values > 0 && end - begin > w.most_values)
      return tile + " has room for " + std::to_string(end - begin) + " values, more than the " +
             std::to_string(w.most_values) + " that are said to be the most";
    if (!bits_inside(bitmap, w.K - t % tiles_k * kTile, w.N - t / tiles_k * kTile))
      return tile + " has bits outside of the weight [" + std::to_string(w.K) + ", " + std::to_string(w.N) + "]";
  }
  return "";
}

std::string check_metadata(const Weight& w, int64_t tiles, int64_t num_values) {
  if (num_values != tiles * kValues24) return expected("number of values", num_values, tiles * kValues24);
  for (int64_t i = 0; i < tiles * kBitmapBytes; ++i)
    for (const int nibble : {w.bitmap[i] & 15, w.bitmap[i] >> 4})
      if ((nibble & 3) >= nibble >> 2)
        return "byte " + std::to_string(i) + " of the metadata says that values " + std::to_string(nibble & 3) +
               " and " + std::to_string(nibble >> 2) + " of four are stored, expected two in ascending order";
  return "";
}

}  // namespace

std::string validate(const Weight& w, int64_t bitmap_bytes, int64_t num_values, int64_t num_offsets) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  if (w.K < 1 || w.N < 1 || w.K >= kLimit || w.N >= kLimit)
    return "K and N must be between 1 and 2^31 - 1, found " + std::to_string(w.K) + " and " + std::to_string(w.N);
  constexpr int64_t kMostInt8 = kLimit / (128 * 127);  // sums of products of codes are int32
  if ((w.layout == Layout::mma8 || w.layout == Layout::sp8) && w.K > kMostInt8)
    return "K is " + std::to_string(w.K) + ", with int8 values at most " + std::to_string(kMostInt8);
  const int32_t layout = static_cast<int32_t>(w.layout);
  if (layout < 16 || layout > 19) return "layout " + std::to_string(layout) + ", expected 16 to 19";
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, tiles = tiles_k * ((w.N + kTile - 1) / kTile);
  if (bitmap_bytes / kBitmapBytes != tiles || bitmap_bytes % kBitmapBytes)
    return expected("bytes of the bitmap", bitmap_bytes, tiles * kBitmapBytes);
  if (num_offsets != tiles + 1) return expected("number of offsets", num_offsets, tiles + 1);
  const bool sparse24 = w.layout == Layout::sp16 || w.layout == Layout::sp8;
  const std::string reason =
      sparse24 ? check_metadata(w, tiles, num_values) : check_bitmap(w, tiles_k, tiles, num_values);
  if (!reason.empty()) return reason;
  for (int64_t n = 0; w.scale && n < w.N; ++n)
    if (!(w.scale[n] > 0) || !std::isfinite(w.scale[n]))
      return "scale of column " + std::to_string(n) + " is " + std::to_string(w.scale[n]) +
             ", expected a finite number above 0";
  return "";
}

}  // namespace optimize::sparse_matmul::cuda
