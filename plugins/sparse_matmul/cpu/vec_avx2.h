// Vectors of 8 floats (AVX2 and FMA); see vec_avx512.h, which has the same names.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace optimize::sparse_matmul {
namespace {

using Vec = __m256;
constexpr int64_t kLanes = 8;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float v) { return _mm256_set1_ps(v); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_first(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }

inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec abs(Vec v) { return _mm256_andnot_ps(broadcast(-0.0f), v); }
inline Vec round(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec at_least(float limit, Vec v) { return _mm256_max_ps(broadcast(limit), v); }
inline Vec at_most(float limit, Vec v) { return _mm256_min_ps(broadcast(limit), v); }
inline Vec where_negative(Vec v, Vec a, Vec b) { return _mm256_blendv_ps(b, a, v); }
// In two steps, since 2^n alone may be outside of the range of float.
inline Vec scale(Vec v, Vec n) {
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return mul(mul(v, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline Vec from_integers(Vec bits) { return _mm256_cvtepi32_ps(_mm256_castps_si256(bits)); }

inline void transpose(const float* from, int64_t from_row, Vec* out) {
  __m256 a[8];
  // a[4 q + r] holds columns 4 q .. 4 q + 3 of rows r and r + 4.
  for (int q = 0; q < 2; ++q)
    for (int r = 0; r < 4; ++r) {
      const float* p = from + r * from_row + 4 * q;
      a[4 * q + r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * from_row), 1);
    }
  for (int i = 0; i < 8; i += 4) {
    const __m256 lo01 = _mm256_unpacklo_ps(a[i], a[i + 1]), hi01 = _mm256_unpackhi_ps(a[i], a[i + 1]);
    const __m256 lo23 = _mm256_unpacklo_ps(a[i + 2], a[i + 3]), hi23 = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
    out[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(lo01), _mm256_castps_pd(lo23)));
    out[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(lo01), _mm256_castps_pd(lo23)));
    out[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(hi01), _mm256_castps_pd(hi23)));
    out[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(hi01), _mm256_castps_pd(hi23)));
  }
}

}  // namespace
}  // namespace optimize::sparse_matmul
