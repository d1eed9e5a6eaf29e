// Products of int8 tiles with AMX. A tile holds 16 rows of 64 bytes: 16 tokens by 64 codes, or 64 rows of W by 16
// columns, which is how `expand` leaves them: the rows of column group j of a stored tile are 256 bytes apart.
#include "s8_avx512.h"

namespace optimize::sparse_matmul {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
}

constexpr int64_t kBlock = 16;  // stored tiles along K whose 32 columns stay in the first cache

// sums [16 or 32 tokens][32 columns] += codes * dense, over `count` stored tiles.
template <bool kTwo>
inline void product(const int8_t* dense, int64_t count, const int8_t* codes, int64_t stride, bool first,
                    int32_t* sums) {
  constexpr int64_t kRow = 32 * 4;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + 16, kRow);
    if (kTwo) {
      _tile_loadd(2, sums + 16 * 32, kRow);
      _tile_loadd(3, sums + 16 * 32 + 16, kRow);
    }
  }
  const int8_t* lower = codes + 16 * stride;
  for (int64_t kt = 0; kt < count; ++kt) {
    const int8_t* b = dense + kt * (kTile * kTile / 2);
    _tile_loadd(4, codes + kt * kTile, stride);
    _tile_loadd(6, b, 128);
    _tile_loadd(7, b + 64, 128);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (kTwo) {
      _tile_loadd(5, lower + kt * kTile, stride);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + 16, kRow);
  if (kTwo) {
    _tile_stored(2, sums + 16 * 32, kRow);
    _tile_stored(3, sums + 16 * 32 + 16, kRow);
  }
}

void large(const Weight& w, int64_t strip, const int8_t* dense, const int32_t*, Codes codes, int64_t M, int32_t* sums,
           float* y) {
  configure();  // the caller's threads may run other code that uses tiles, so it is done each time
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t column = strip * kTile + half * 32;
    if (column >= w.N) break;
    for (int64_t kt = 0; kt < tiles_k; kt += kBlock) {
      const int64_t count = tiles_k - kt < kBlock ? tiles_k - kt : kBlock;
      const int8_t* b = dense + (half * tiles_k + kt) * (kTile * kTile / 2);
      const bool last = kt + count == tiles_k;
      for (int64_t m = 0; m < M; m += 32) {
        const int64_t left = M - m, tokens = left < 32 ? left : 32;
        int32_t* sum = sums + m * 32;
        const int8_t* a = codes.data + m * codes.stride + kt * kTile;
        if (tokens > 16)
          product<true>(b, count, a, codes.stride, kt == 0, sum);
        else
          product<false>(b, count, a, codes.stride, kt == 0, sum);
        if (!last) continue;
        for (int64_t t = 0; t < tokens; ++t) {
          const float step = codes.steps[m + t];
          finish(w, column, _mm512_loadu_si512(sum + t * 32), step, y + (m + t) * w.N);
          finish(w, column + 16, _mm512_loadu_si512(sum + t * 32 + 16), step, y + (m + t) * w.N);
        }
      }
    }
  }
  _tile_release();
}

}  // namespace

const S8Dense* s8_amx() {
  static const S8Dense kernels{s8_avx512()->quantize, s8_avx512()->column_sums, s8_avx512()->small,
                               s8_avx512()->expand, large, s8_avx512()->spread, s8_avx512()->window_sums,
                               s8_avx512()->finish};
  return &kernels;
}

}  // namespace optimize::sparse_matmul
