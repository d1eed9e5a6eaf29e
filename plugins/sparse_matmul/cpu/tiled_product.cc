#include "tiled_product.h"

#include <algorithm>

#include "parallel.h"
#include "scratch.h"

namespace optimize::sparse_matmul {

namespace {
constexpr int64_t kElement = 4;  // bytes
}

double density_of(const Weight& w) {
  int64_t bits = 0;
  for (int64_t i = 0; i < w.tiles() * kBitmapBytes; ++i) bits += __builtin_popcount(w.bitmap[i]);
  return static_cast<double>(bits) / (static_cast<double>(w.K) * static_cast<double>(w.N));
}

void TiledProduct::make_lists(const Parallel& parallel) const {
  std::call_once(once_, [&] {
    std::vector<StripLists> made(static_cast<size_t>(w_.tiles_n()));
    run_tasks(parallel, w_.tiles_n(), [&](int64_t strip) {
      StripLists& lists = made[static_cast<size_t>(strip)];
      lists = make_(w_, strip, shape_);
      lists.codes.shrink_to_fit();
      lists.values.shrink_to_fit();
    });
    lists_ = std::move(made);
  });
}

// In chunks of tokens whose X^T stays in the caches.
void TiledProduct::run(const void* x, const float* steps, int64_t M, float* y, const Parallel& parallel) const {
  make_lists(parallel);
  constexpr int64_t kChunkElements = int64_t{1} << 20;
  const int64_t tile = shape_.vectors * shape_.lanes,
                most = std::max<int64_t>(1, kChunkElements / (rows_ * tile)) * tile;
  for (int64_t first = 0; first < M; first += most)
    run_chunk(static_cast<const char*>(x) + first * rows_ * kElement, steps ? steps + first : nullptr,
              std::min(most, M - first), y + first * w_.N, parallel);
}

// Tiles of equal numbers of vectors, so that no last tile is nearly empty.
TiledProduct::TokenTile TiledProduct::tile_of(int64_t tokens, int64_t tiles, int64_t i) const {
  const int64_t vectors = (tokens + shape_.lanes - 1) / shape_.lanes;
  const int64_t begin = vectors * i / tiles, end = vectors * (i + 1) / tiles, first = begin * shape_.lanes;
  return {first, std::min(tokens, end * shape_.lanes) - first, end - begin};
}

void TiledProduct::run_chunk(const char* x, const float* steps, int64_t tokens, float* y,
                             const Parallel& parallel) const {
  const int64_t vectors = (tokens + shape_.lanes - 1) / shape_.lanes;
  const int64_t tiles = (vectors + shape_.vectors - 1) / shape_.vectors;
  const int64_t tile_elements = rows_ * shape_.stride(shape_.vectors);
  static thread_local Scratch scratch;
  float* xt = scratch.floats(tiles * tile_elements);

  constexpr int64_t kRows = 256;
  const int64_t parts = (rows_ + kRows - 1) / kRows;
  run_tasks(parallel, tiles * parts, [&](int64_t i) {
    const TokenTile t = tile_of(tokens, tiles, i / parts);
    const int64_t begin = i % parts * kRows, end = std::min(rows_, begin + kRows);
    kernels_.transpose(x + t.first * rows_ * kElement, rows_, begin, end, t.tokens, shape_.stride(t.vectors),
                       xt + i / parts * tile_elements);
  });
  const int64_t strips = w_.tiles_n();
  run_tasks(parallel, tiles * strips, [&](int64_t i) {
    const TokenTile t = tile_of(tokens, tiles, i / strips);
    strip_of(i % strips, xt + i / strips * tile_elements, t, steps ? steps + t.first : nullptr, y + t.first * w_.N);
  });
}

void TiledProduct::strip_of(int64_t strip, const float* xt, const TokenTile& tile, const float* steps, float* y) const {
  static thread_local Scratch scratch;
  const int64_t blocks = (rows_ + shape_.block - 1) / shape_.block, stride = shape_.stride(tile.vectors);
  float* sums = scratch.floats(kTile * stride);
  std::fill_n(sums, kTile * stride, 0.0f);
  const StripLists& lists = lists_[static_cast<size_t>(strip)];
  for (int64_t b = 0; b < blocks; ++b)
    kernels_.apply(lists.codes.data() + lists.code_begin[static_cast<size_t>(b)],
                   lists.values.data() + lists.value_begin[static_cast<size_t>(b)], xt + b * shape_.block * stride,
                   tile.vectors, sums);
  kernels_.finish(w_, strip, sums, steps, tile.tokens, stride, y);
}

}  // namespace optimize::sparse_matmul
