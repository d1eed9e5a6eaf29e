// int8 kernels of AVX-512 with VNNI and VBMI2: 64 stored bytes become a dense group of 16 columns by 4 rows with one
// expansion, which is what one product of VNNI takes.
#include "s8_avx512.h"

namespace optimize::sparse_matmul {
namespace {

float quantize(const float* x, int64_t K, const float* x_scale, int8_t* codes) {
  float step;
  if (x_scale) {
    step = *x_scale;
  } else {
    __m512 top = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) top = _mm512_max_ps(top, abs(load(x + k)));
    if (k < K) top = _mm512_max_ps(top, abs(load_first(x + k, K - k)));
    const float largest = _mm512_reduce_max_ps(top);
    step = (largest > 1e-12f ? largest : 1e-12f) / 127.0f;
  }
  const Vec inverse = broadcast(1.0f / step);
  const int64_t padded = (K + kTile - 1) / kTile * kTile;
  for (int64_t k = 0; k < padded; k += 16) {
    const int64_t left = K - k;
    const Vec v = left >= 16 ? load(x + k) : load_first(x + k, left > 0 ? left : 0);
    // The conversion to bytes saturates at -128 and 127.
    _mm_store_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(mul(v, inverse))));
  }
  return step;
}

// The values of a tile, or a copy of them where 64 bytes read at its last one would leave the array.
inline const int8_t* values_of(const Weight& w, int64_t tile, int8_t* copy) {
  const int8_t* all = static_cast<const int8_t*>(w.values);
  const int64_t begin = w.offsets[tile], end = w.offsets[tile + 1];
  if (end + 64 <= w.num_values) return all + begin;
  int64_t count = w.num_values - begin;
  if (count > kTile * kTile) count = kTile * kTile;
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t left = count - i;
    const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    _mm512_storeu_si512(copy + i, _mm512_maskz_loadu_epi8(mask, all + begin + i));
  }
  return copy;
}

constexpr int64_t kCopy = kTile * kTile + 64;

struct Groups {
  __m512i w[4];
};

// The 64 columns of 4 rows; moves `values` on.
inline Groups next_groups(const uint8_t* bitmap, const int8_t*& values) {
  uint64_t mask[4];
  std::memcpy(mask, bitmap, sizeof mask);
  const int64_t a = __builtin_popcountll(mask[0]), b = a + __builtin_popcountll(mask[1]),
                c = b + __builtin_popcountll(mask[2]), d = c + __builtin_popcountll(mask[3]);
  _mm_prefetch(reinterpret_cast<const char*>(values + 2048), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(values + 2112), _MM_HINT_T0);
  Groups g;
  g.w[0] = _mm512_maskz_expand_epi8(mask[0], _mm512_loadu_si512(values));
  g.w[1] = _mm512_maskz_expand_epi8(mask[1], _mm512_loadu_si512(values + a));
  g.w[2] = _mm512_maskz_expand_epi8(mask[2], _mm512_loadu_si512(values + b));
  g.w[3] = _mm512_maskz_expand_epi8(mask[3], _mm512_loadu_si512(values + c));
  values += d;
  return g;
}

template <int kM>
void small_of(const Weight& w, int64_t strip, const int32_t* column_sums, Codes codes, float* y) {
  __m512i sums[kM][4];
  for (int m = 0; m < kM; ++m)
    for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_setzero_si512();
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  alignas(64) int8_t copy[kCopy];
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt;
    const int8_t* values = values_of(w, tile, copy);
    const uint8_t* bitmap = w.bitmap + tile * kBitmapBytes;
    const int8_t* x = codes.data + kt * kTile;
    for (int i = 0; i < 16; ++i) {
      const Groups g = next_groups(bitmap + i * 32, values);
      for (int m = 0; m < kM; ++m) {
        uint32_t four;
        std::memcpy(&four, x + m * codes.stride + i * 4, 4);
        const __m512i xs = _mm512_set1_epi32(static_cast<int32_t>(four ^ 0x80808080u));  // codes + 128
        for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_dpbusd_epi32(sums[m][j], xs, g.w[j]);
      }
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int j = 0; j < 4; ++j) {
      const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(column_sums + j * 16), 7);
      finish(w, strip * kTile + j * 16, _mm512_sub_epi32(sums[m][j], offset), codes.steps[m], y + m * w.N);
    }
}

template <int kM = 1>
void small_by_tokens(const Weight& w, int64_t strip, const int32_t* column_sums, Codes codes, int64_t M, float* y) {
  if constexpr (kM < 6)
    if (M > kM) return small_by_tokens<kM + 1>(w, strip, column_sums, codes, M, y);
  small_of<kM>(w, strip, column_sums, codes, y);
}

inline Codes from(Codes codes, int64_t m) { return {codes.data + m * codes.stride, codes.stride, codes.steps + m}; }

// 6 tokens are as many as the registers hold.
void small(const Weight& w, int64_t strip, const int32_t* column_sums, Codes codes, int64_t M, float* y) {
  for (int64_t m = 0; m < M;) {
    const int64_t left = M - m, now = left <= 6 ? left : (left + 1) / 2;
    small_by_tokens(w, strip, column_sums, from(codes, m), now, y + m * w.N);
    m += now;
  }
}

void expand(const Weight& w, int64_t strip, int8_t* dense) {
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  alignas(64) int8_t copy[kCopy];
  const int64_t half = tiles_k * (kTile * kTile / 2);
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt;
    const int8_t* values = values_of(w, tile, copy);
    const uint8_t* bitmap = w.bitmap + tile * kBitmapBytes;
    for (int i = 0; i < 16; ++i, dense += 128) {
      const Groups g = next_groups(bitmap + i * 32, values);
      for (int j = 0; j < 4; ++j) _mm512_store_si512(dense + j / 2 * half + j % 2 * 64, g.w[j]);
    }
  }
}

void column_sums(const Weight& w, int64_t strip, int32_t* sums) {
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  alignas(64) int8_t copy[kCopy];
  __m512i total[4] = {};
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt;
    const int8_t* values = values_of(w, tile, copy);
    for (int i = 0; i < 16; ++i) {
      const Groups g = next_groups(w.bitmap + tile * kBitmapBytes + i * 32, values);
      for (int j = 0; j < 4; ++j) total[j] = _mm512_dpbusd_epi32(total[j], ones, g.w[j]);
    }
  }
  for (int j = 0; j < 4; ++j) _mm512_storeu_si512(sums + j * 16, total[j]);
}

template <int kM>
void large_of(const Weight& w, int64_t strip, const int8_t* dense, const int32_t* column_sums, Codes codes, float* y) {
  __m512i sums[kM][4];
  for (int m = 0; m < kM; ++m)
    for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_setzero_si512();
  const int64_t rows = (w.K + 3) / 4, half = (w.K + kTile - 1) / kTile * (kTile * kTile / 2);
  for (int64_t i = 0; i < rows; ++i) {
    __m512i ws[4];
    for (int j = 0; j < 4; ++j) ws[j] = _mm512_load_si512(dense + j / 2 * half + i * 128 + j % 2 * 64);
    for (int m = 0; m < kM; ++m) {
      uint32_t four;
      std::memcpy(&four, codes.data + m * codes.stride + i * 4, 4);
      const __m512i xs = _mm512_set1_epi32(static_cast<int32_t>(four ^ 0x80808080u));
      for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_dpbusd_epi32(sums[m][j], xs, ws[j]);
    }
  }
  for (int m = 0; m < kM; ++m)
    for (int j = 0; j < 4; ++j) {
      const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(column_sums + j * 16), 7);
      finish(w, strip * kTile + j * 16, _mm512_sub_epi32(sums[m][j], offset), codes.steps[m], y + m * w.N);
    }
}

template <int kM = 6>
void large_by_tokens(const Weight& w, int64_t strip, const int8_t* dense, const int32_t* column_sums, Codes codes,
                     int64_t M, float* y) {
  if constexpr (kM > 1)
    if (M < kM) return large_by_tokens<kM - 1>(w, strip, dense, column_sums, codes, M, y);
  large_of<kM>(w, strip, dense, column_sums, codes, y);
}

void large(const Weight& w, int64_t strip, const int8_t* dense, const int32_t* column_sums, Codes codes, int64_t M,
           int32_t*, float* y) {
  for (int64_t m = 0; m < M; m += 6)
    large_by_tokens(w, strip, dense, column_sums, from(codes, m), M - m, y + m * w.N);
}

constexpr S8Dense kKernels{quantize, column_sums, small, expand, large};

}  // namespace

const S8Dense* s8_avx512() { return &kKernels; }

}  // namespace optimize::sparse_matmul
