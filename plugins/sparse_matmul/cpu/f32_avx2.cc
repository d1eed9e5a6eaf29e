// float32 kernels for AVX2.
#include "vec_avx2.h"
//
#include "vec_math.h"

namespace optimize::sparse_matmul {
namespace {

constexpr int64_t kRegisters = 6;
constexpr bool kScaled = false;
constexpr int kTokens = 6;
constexpr int kColumns(int tokens) { return tokens == 1 ? 8 : tokens <= 3 ? 4 : 2; }

// For each byte of a bitmap, which value belongs to each lane; -1 in lanes whose bit is not set.
struct ExpandTable {
  int8_t at[256][8];
};
constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int lane = 0; lane < 8; ++lane) table.at[bits][lane] = static_cast<int8_t>(bits >> lane & 1 ? next++ : -1);
  }
  return table;
}
alignas(64) constexpr ExpandTable kExpand = make_expand_table();

inline Vec expand_at(uint64_t bits, const float* v) {
  const __m256i at = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.at[bits & 255])));
  const __m256i absent = _mm256_srai_epi32(at, 31);
  return _mm256_andnot_ps(_mm256_castsi256_ps(absent), _mm256_permutevar8x32_ps(load(v), at));
}

}  // namespace
}  // namespace optimize::sparse_matmul

#include "f32_simd.h"

namespace optimize::sparse_matmul {
namespace {

inline Vec gather(const uint16_t* rows, const float* x) {
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows))), 4);
}

TileShape shape(double) { return {kLanes, kRegisters, 128, kScaled}; }

}  // namespace
}  // namespace optimize::sparse_matmul

#include "f32_slices.h"

namespace optimize::sparse_matmul {

const F32Kernels* f32_avx2() {
  static constexpr F32Kernels kKernels{kLanes, shape, 2.0, 8.0, kPairs, expand, slices};
  return &kKernels;
}

}  // namespace optimize::sparse_matmul
