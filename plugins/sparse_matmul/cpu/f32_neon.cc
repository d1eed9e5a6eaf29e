// float32 kernels for Arm's Advanced SIMD.
#include "vec_neon.h"
//
#include "vec_math.h"

namespace optimize::sparse_matmul {
namespace {

constexpr int64_t kRegisters = 10;
constexpr bool kScaled = false;
constexpr int kTokens = 6;
constexpr int kColumns(int tokens) { return tokens <= 2 ? 8 : 4; }

// For each four bits of a bitmap, which byte of the values belongs to each byte of the lanes; 255 (which the table
// lookup answers with 0) in lanes whose bit is not set.
struct ExpandTable {
  uint8_t at[16][16];
};
constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 16; ++bits) {
    int next = 0;
    for (int lane = 0; lane < 4; ++lane) {
      const bool set = bits >> lane & 1;
      for (int byte = 0; byte < 4; ++byte)
        table.at[bits][4 * lane + byte] = static_cast<uint8_t>(set ? 4 * next + byte : 255);
      next += set;
    }
  }
  return table;
}
alignas(64) constexpr ExpandTable kExpand = make_expand_table();

inline Vec expand_at(uint64_t bits, const float* v) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(load(v)), vld1q_u8(kExpand.at[bits & 15])));
}

}  // namespace
}  // namespace optimize::sparse_matmul

#include "f32_simd.h"

namespace optimize::sparse_matmul {
namespace {

// 10 registers of a and of b, one of x and two of weights, of 32.
TileShape shape(double) { return {kLanes, kRegisters, 128, kScaled}; }

}  // namespace

const F32Kernels* f32_neon() {
  static constexpr F32Kernels kKernels{kLanes, shape, 2.0, 8.0, kPairs, expand, nullptr};
  return &kKernels;
}

}  // namespace optimize::sparse_matmul
