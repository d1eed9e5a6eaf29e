// Parts that s8_avx512.cc and s8_amx.cc share. Everything has internal linkage.
#pragma once

#include <cstring>

#include "s8_dense.h"
#include "vec_avx512.h"
#include "vec_math.h"

namespace optimize::sparse_matmul {
namespace {

// sums of 16 columns of one token to y.
inline void finish(const Weight& w, int64_t column, __m512i sums, float step, float* y) {
  const int64_t left = w.N - column, count = left < 16 ? left : 16;
  if (count <= 0) return;
  Vec v = mul(mul(_mm512_cvtepi32_ps(sums), broadcast(step)), load_first(w.scale + column, count));
  if (w.bias) v = add(v, load_first(w.bias + column, count));
  store_first(y + column, activate(w.activation, v), count);
}

}  // namespace
}  // namespace optimize::sparse_matmul
