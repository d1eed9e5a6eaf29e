// float32 kernels for AVX-512.
#include "vec_avx512.h"
//
#include "vec_math.h"

namespace optimize::sparse_matmul {
namespace {

constexpr int64_t kRegisters = 8;
constexpr int kTokens = 13;
constexpr int kColumns(int tokens) { return tokens <= 6 ? 4 : 2; }

inline Vec expand_at(uint64_t bits, const float* v) {
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), load(v));
}

}  // namespace
}  // namespace optimize::sparse_matmul

#include "f32_simd.h"

namespace optimize::sparse_matmul {
namespace {

void slices(const Weight& w, const Slices& s, int64_t window, const float* x, float* y) {
  const int64_t begin = window * (kWindow / kLanes), columns = min64(kWindow, w.N - window * kWindow);
  alignas(64) float sums[kWindow];
  for (int64_t i = begin; i * kLanes < window * kWindow + columns; ++i) {
    Vec a = zero(), b = zero();
    int64_t p = s.steps[i] * kLanes;
    const int64_t end = s.steps[i + 1] * kLanes;
    const auto part = [&](int64_t at, Vec sum) {
      const __m512i rows = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s.rows + at)));
      return fma(load(s.values + at), _mm512_i32gather_ps(rows, x, 4), sum);
    };
    for (; p + kLanes < end; p += 2 * kLanes) a = part(p, a), b = part(p + kLanes, b);
    if (p < end) a = part(p, a);
    const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s.columns + i * kLanes));
    _mm512_i32scatter_ps(sums, _mm512_cvtepu8_epi32(at), add(a, b), 4);
  }
  for (int64_t n = 0; n < columns; n += kLanes) {
    const int64_t column = window * kWindow + n, count = min64(kLanes, columns - n);
    Vec v = load(sums + n);
    if (w.bias) v = add(v, load_first(w.bias + column, count));
    store_first(y + column, activate(w.activation, v), count);
  }
}

PairShape shape(double density) { return density < 0.15 ? PairShape{4 * kLanes, 128} : PairShape{8 * kLanes, 64}; }

}  // namespace

const F32Kernels* f32_avx512() {
  static constexpr F32Kernels kKernels{kLanes, shape, expand, transpose_x, pairs, finish_pairs, slices};
  return &kKernels;
}

}  // namespace optimize::sparse_matmul
