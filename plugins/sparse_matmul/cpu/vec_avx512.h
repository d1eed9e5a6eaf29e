// Vectors of 16 floats (AVX-512). The same names exist in vec_avx2.h and vec_neon.h; vec_math.h builds on them.
// Only for files compiled for this instruction set: everything has internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace optimize::sparse_matmul {
namespace {

using Vec = __m512;
constexpr int64_t kLanes = 16;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float v) { return _mm512_set1_ps(v); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// The first n lanes, 0 <= n <= 16; the other lanes are 0 and their memory is not touched.
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store_first(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }  // a b - c
inline Vec abs(Vec v) { return _mm512_abs_ps(v); }
inline Vec round(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Larger or smaller of limit and v; NaN where v is.
inline Vec at_least(float limit, Vec v) { return _mm512_max_ps(broadcast(limit), v); }
inline Vec at_most(float limit, Vec v) { return _mm512_min_ps(broadcast(limit), v); }
// a where v has its sign bit set, else b.
inline Vec where_negative(Vec v, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(v)), b, a);
}
// v 2^n, n whole and within +-200.
inline Vec scale(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }
// The int32 numbers whose bits the lanes have, as floats.
inline Vec from_integers(Vec bits) { return _mm512_cvtepi32_ps(_mm512_castps_si512(bits)); }

// out[j][i] = from[i * from_row + j] for i, j < 16.
inline void transpose(const float* from, int64_t from_row, Vec* out) {
  __m512 a[16];
  // a[4 q + r] holds columns 4 q .. 4 q + 3 of rows r, r + 4, r + 8 and r + 12.
  for (int q = 0; q < 4; ++q)
    for (int r = 0; r < 4; ++r) {
      const float* p = from + r * from_row + 4 * q;
      __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
      v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(p + 4 * from_row));
      v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(p + 8 * from_row));
      a[4 * q + r] = _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(p + 12 * from_row));
    }
  for (int i = 0; i < 16; i += 4) {
    // 4 x 4 transposes within each quarter
    const __m512 lo01 = _mm512_unpacklo_ps(a[i], a[i + 1]), hi01 = _mm512_unpackhi_ps(a[i], a[i + 1]);
    const __m512 lo23 = _mm512_unpacklo_ps(a[i + 2], a[i + 3]), hi23 = _mm512_unpackhi_ps(a[i + 2], a[i + 3]);
    out[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(lo01), _mm512_castps_pd(lo23)));
    out[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(lo01), _mm512_castps_pd(lo23)));
    out[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(hi01), _mm512_castps_pd(hi23)));
    out[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(hi01), _mm512_castps_pd(hi23)));
  }
}

}  // namespace
}  // namespace optimize::sparse_matmul
