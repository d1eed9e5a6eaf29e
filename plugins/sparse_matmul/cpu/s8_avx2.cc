// int8 kernels for AVX2. Products are of int16 (vpmaddwd), since those of bytes (vpmaddubsw) saturate.
#include "vec_avx2.h"
//
#include "vec_math.h"

namespace optimize::sparse_matmul {
namespace {

using Code = int16_t;

// Lanes 2 n and 2 n + 1 are the sums over even and odd halves of the groups of four k, of column n.
struct Sums {
  int32_t lane[2 * kTile];
};

// For each byte of a bitmap, which value belongs to each byte of eight; -1 (which vpshufb answers with 0) where the
// bit is not set.
struct ExpandTable {
  int8_t at[256][16];
};
constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int i = 0; i < 16; ++i) table.at[bits][i] = static_cast<int8_t>(i < 8 && (bits >> i & 1) ? next++ : -1);
  }
  return table;
}
alignas(64) constexpr ExpandTable kExpand = make_expand_table();

inline __m128i expand_byte(uint64_t bits, const int8_t* v) {
  return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v)),
                          _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand.at[bits & 255])));
}

void expand_tile(const uint8_t* bitmap, const int8_t* v, int8_t* dense) {
  for (int64_t i = 0; i < kBitmapBytes; i += 8) {
    uint64_t word;
    __builtin_memcpy(&word, bitmap + i, 8);
    for (int64_t j = 0; j < 8; j += 2) {
      const int8_t* second = v + __builtin_popcountll(word & 0xff);
      const __m128i both = _mm_unpacklo_epi64(expand_byte(word, v), expand_byte(word >> 8, second));
      _mm_store_si128(reinterpret_cast<__m128i*>(dense + (i + j) * 8), both);
      v += __builtin_popcountll(word & 0xffff);
      word >>= 16;
    }
    _mm_prefetch(reinterpret_cast<const char*>(v + 1024), _MM_HINT_T0);
  }
}

template <int kM>
inline void dot_tokens(const int8_t* dense, const int16_t* codes, int64_t row, Sums* sums) {
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    __m256i sum[kM][4];
    for (int m = 0; m < kM; ++m)
      for (int j = 0; j < 4; ++j)
        sum[m][j] = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums[m].lane + 32 * quarter + 8 * j));
    for (int64_t k = 0; k < kTile; k += 4) {
      __m256i x[kM];
      for (int m = 0; m < kM; ++m) {
        int64_t four;
        __builtin_memcpy(&four, codes + m * row + k, 8);
        x[m] = _mm256_set1_epi64x(four);
      }
      for (int j = 0; j < 4; ++j) {
        const int8_t* p = dense + k * kTile + quarter * 64 + j * 16;
        const __m256i w = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
        for (int m = 0; m < kM; ++m) sum[m][j] = _mm256_add_epi32(sum[m][j], _mm256_madd_epi16(w, x[m]));
      }
    }
    for (int m = 0; m < kM; ++m)
      for (int j = 0; j < 4; ++j)
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums[m].lane + 32 * quarter + 8 * j), sum[m][j]);
  }
}

void dot_tile(const int8_t* dense, const int16_t* codes, int64_t row, int64_t M, Sums* sums) {
  int64_t m = 0;
  for (; m + 3 <= M; m += 3) dot_tokens<3>(dense, codes + m * row, row, sums + m);
  if (M - m == 2) dot_tokens<2>(dense, codes + m * row, row, sums + m);
  if (M - m == 1) dot_tokens<1>(dense, codes + m * row, row, sums + m);
}

inline Vec columns_of(const Sums& sums, int64_t n) {
  const __m256i* p = reinterpret_cast<const __m256i*>(sums.lane + 2 * n);
  const __m256i halves = _mm256_hadd_epi32(_mm256_load_si256(p), _mm256_load_si256(p + 1));
  return _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(halves, 0xd8));
}

using Integers = __m256i;
constexpr int64_t kRegisters = 12, kBlock = 64;
inline Integers load_integers(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_integers(char* p, Integers v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline Integers broadcast_integers(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }
inline Integers dot(Integers w, Integers x, Integers sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }

float quantize(const float* x, int64_t K, const float* x_scale, void* codes) {
  int16_t* q = static_cast<int16_t*>(codes);
  Vec top = zero();
  for (int64_t k = 0; k < K && !x_scale; k += kLanes)
    top = _mm256_max_ps(abs(load_first(x + k, K - k < kLanes ? K - k : kLanes)), top);  // leaves out NaN
  float step = 1e-12f, lanes[kLanes];
  store(lanes, top);
  for (const float lane : lanes) step = lane > step ? lane : step;
  step = x_scale ? *x_scale : step / 127.0f;
  const Vec inverse = broadcast(1.0f / step);
  for (int64_t k = 0; k < (K + kTile - 1) / kTile * kTile; k += kLanes) {
    const int64_t left = K - k;
    const Vec v = left >= kLanes ? load(x + k) : load_first(x + k, left < 0 ? 0 : left);
    const Vec inside = at_most(127.0f, _mm256_max_ps(mul(v, inverse), broadcast(-128.0f)));  // NaN becomes -128
    const __m256i code = _mm256_cvtps_epi32(inside);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k),
                     _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1)));
  }
  return step;
}

}  // namespace
}  // namespace optimize::sparse_matmul

#include "s8_simd.h"

namespace optimize::sparse_matmul {

const S8Kernels* s8_avx2() { return &kKernels; }

}  // namespace optimize::sparse_matmul
