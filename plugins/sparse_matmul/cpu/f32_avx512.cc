// float32 kernels for AVX-512.
#include "vec_avx512.h"
//
#include "vec_math.h"

namespace optimize::sparse_matmul {
namespace {

constexpr int64_t kRegisters = 8;
constexpr bool kScaled = true;
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

inline Vec gather(const uint16_t* rows, const float* x) {
  return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows))), x, 4);
}

TileShape shape(double density) {
  return density < 0.15 ? TileShape{kLanes, 4, 128, kScaled} : TileShape{kLanes, kRegisters, 64, kScaled};
}

}  // namespace
}  // namespace optimize::sparse_matmul

#include "f32_slices.h"

namespace optimize::sparse_matmul {

const F32Kernels* f32_avx512() {
  static constexpr F32Kernels kKernels{kLanes, shape, 1.0, 28.0, kPairs, expand, slices};
  return &kKernels;
}

}  // namespace optimize::sparse_matmul
