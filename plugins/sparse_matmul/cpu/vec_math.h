// Bias and activations on vectors. Include one of vec_avx512.h, vec_avx2.h or vec_neon.h before.
//
// Errors against float64 for every finite float32 v (eps = 2^-24):
//   gelu       at most 8 eps |y|
//   gelu_tanh  at most (8 + 6 |u|) eps |y|, u the argument of its sigmoid below
//   silu       at most 6 eps |y|
// and, where |y| < 2^-118, 2^-139 besides. The body's own float32 form loses all digits for v below about -5.
// NaN stays NaN.
#pragma once

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {
namespace {

// e^v for v <= 0; Cody and Waite's reduction to |r| <= log(2) / 2 and the Taylor series to r^7.
inline Vec exp_negative(Vec v) {
  v = at_least(-120.0f, v);  // e^-104 is 0 in float32
  const Vec n = round(mul(v, broadcast(1.44269504f)));
  Vec r = fma(n, broadcast(-0.693359375f), v);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return scale(p, n);
}

// v / (1 + e^-u) where u has the sign of v; no intermediate overflows.
inline Vec times_sigmoid(Vec v, Vec u) {
  const Vec e = exp_negative(sub(zero(), abs(u)));
  return div(mul(v, where_negative(u, e, broadcast(1.0f))), add(broadcast(1.0f), e));
}

// v Phi(v). With a = |v| and t = 1 / (1 + 0.3 a), Phi(-a) = t P(t) e^(-a^2 / 2); P is a weighted least-squares
// fit on 0 <= a <= 15 whose own relative error is 3.5e-9.
inline Vec gelu(Vec v) {
  const Vec a = at_most(15.0f, abs(v));
  const Vec t = div(broadcast(1.0f), fma(a, broadcast(0.3f), broadcast(1.0f)));
  constexpr float kP[] = {0.11968671530485153f, 0.11957129091024399f,  0.11023958027362823f, 0.0783710852265358f,
                          0.09620831161737442f, -0.07951562851667404f, 0.19189120829105377f, -0.22829081118106842f,
                          0.11246737837791443f, -0.020629141479730606f};
  Vec p = broadcast(kP[9]);
  for (int i = 8; i >= 0; --i) p = fma(p, t, broadcast(kP[i]));
  const Vec square = mul(a, a), rest = fms(a, a, square);  // a^2 = square + rest exactly
  const Vec e = exp_negative(mul(square, broadcast(-0.5f)));
  const Vec tail = mul(mul(t, p), fma(e, mul(rest, broadcast(-0.5f)), e));
  return mul(v, where_negative(v, tail, sub(broadcast(1.0f), tail)));
}

inline Vec activate(Activation kind, Vec v) {
  switch (kind) {
    case Activation::relu:
      return at_least(0.0f, v);
    case Activation::gelu:
      return gelu(v);
    case Activation::gelu_tanh: {  // 1 + tanh(u / 2) = 2 / (1 + e^-u), u = sqrt(8 / pi) (v + 0.044715 v^3)
      const Vec inner = fma(mul(v, v), broadcast(0.044715f), broadcast(1.0f));
      return times_sigmoid(v, mul(mul(v, broadcast(1.59576912f)), inner));
    }
    case Activation::silu:
      return times_sigmoid(v, v);
    default:
      return v;
  }
}

}  // namespace
}  // namespace optimize::sparse_matmul
