// Vectors of 4 floats (Arm's Advanced SIMD, 64-bit); see vec_avx512.h, which has the same names.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace optimize::sparse_matmul {
namespace {

using Vec = float32x4_t;
constexpr int64_t kLanes = 4;

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec broadcast(float v) { return vdupq_n_f32(v); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
inline void prefetch(const float* p) { __builtin_prefetch(p); }

inline Vec load_first(const float* p, int64_t n) {
  float part[4] = {};
  for (int64_t i = 0; i < n && i < 4; ++i) part[i] = p[i];
  return load(part);
}
inline void store_first(float* p, Vec v, int64_t n) {
  float part[4];
  store(part, v);
  for (int64_t i = 0; i < n && i < 4; ++i) p[i] = part[i];
}

inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec fms(Vec a, Vec b, Vec c) { return vnegq_f32(vfmsq_f32(c, a, b)); }
inline Vec abs(Vec v) { return vabsq_f32(v); }
inline Vec round(Vec v) { return vrndnq_f32(v); }
inline Vec at_least(float limit, Vec v) { return vmaxq_f32(broadcast(limit), v); }
inline Vec at_most(float limit, Vec v) { return vminq_f32(broadcast(limit), v); }
inline Vec where_negative(Vec v, Vec a, Vec b) { return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(v)), a, b); }
inline Vec scale(Vec v, Vec n) {
  const auto power = [](int32x4_t e) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23)); };
  const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return mul(mul(v, power(half)), power(vsubq_s32(whole, half)));
}
inline Vec from_integers(Vec bits) { return vcvtq_f32_s32(vreinterpretq_s32_f32(bits)); }

inline void transpose(const float* from, int64_t from_row, Vec* out) {
  const Vec a = load(from), b = load(from + from_row), c = load(from + 2 * from_row), d = load(from + 3 * from_row);
  const Vec lo_ab = vzip1q_f32(a, b), hi_ab = vzip2q_f32(a, b), lo_cd = vzip1q_f32(c, d), hi_cd = vzip2q_f32(c, d);
  out[0] = vcombine_f32(vget_low_f32(lo_ab), vget_low_f32(lo_cd));
  out[1] = vcombine_f32(vget_high_f32(lo_ab), vget_high_f32(lo_cd));
  out[2] = vcombine_f32(vget_low_f32(hi_ab), vget_low_f32(hi_cd));
  out[3] = vcombine_f32(vget_high_f32(hi_ab), vget_high_f32(hi_cd));
}

}  // namespace
}  // namespace optimize::sparse_matmul
