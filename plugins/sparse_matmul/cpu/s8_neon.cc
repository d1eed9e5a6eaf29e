// int8 kernels for Arm's Advanced SIMD with dot products.
#include "vec_neon.h"
//
#include "vec_math.h"

namespace optimize::sparse_matmul {
namespace {

using Code = int8_t;

struct Sums {
  int32_t lane[kTile];  // of columns
};

// For each byte of a bitmap, which value belongs to each byte of eight, 255 (which the table lookup answers with 0)
// where the bit is not set; and the number of its bits, because counting moves through vector registers on Arm.
struct ExpandTable {
  uint8_t at[256][8];
  uint8_t count[256];
};
constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    uint8_t next = 0;
    for (int i = 0; i < 8; ++i) table.at[bits][i] = bits >> i & 1 ? next++ : uint8_t{255};
    table.count[bits] = next;
  }
  return table;
}
alignas(64) constexpr ExpandTable kExpand = make_expand_table();

void expand_tile(const uint8_t* bitmap, const int8_t* v, int8_t* dense) {
  for (int64_t i = 0; i < kBitmapBytes; ++i) {
    vst1_s8(dense + 8 * i, vqtbl1_s8(vld1q_s8(v), vld1_u8(kExpand.at[bitmap[i]])));
    v += kExpand.count[bitmap[i]];
  }
}

template <int kM>
inline void dot_tokens(const int8_t* dense, const int8_t* codes, int64_t row, Sums* sums) {
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    int32x4_t sum[kM][4];
    for (int m = 0; m < kM; ++m)
      for (int j = 0; j < 4; ++j) sum[m][j] = vld1q_s32(sums[m].lane + 16 * quarter + 4 * j);
    for (int64_t k = 0; k < kTile; k += 16) {
      int8x16_t x[kM];
      for (int m = 0; m < kM; ++m) x[m] = vld1q_s8(codes + m * row + k);
      for (int j = 0; j < 4; ++j) {
        const int8_t* p = dense + k * kTile + quarter * 64 + j * 16;
        const int8x16_t w0 = vld1q_s8(p), w1 = vld1q_s8(p + 256), w2 = vld1q_s8(p + 512), w3 = vld1q_s8(p + 768);
        for (int m = 0; m < kM; ++m) {
          sum[m][j] = vdotq_laneq_s32(sum[m][j], w0, x[m], 0);
          sum[m][j] = vdotq_laneq_s32(sum[m][j], w1, x[m], 1);
          sum[m][j] = vdotq_laneq_s32(sum[m][j], w2, x[m], 2);
          sum[m][j] = vdotq_laneq_s32(sum[m][j], w3, x[m], 3);
        }
      }
    }
    for (int m = 0; m < kM; ++m)
      for (int j = 0; j < 4; ++j) vst1q_s32(sums[m].lane + 16 * quarter + 4 * j, sum[m][j]);
  }
}

void dot_tile(const int8_t* dense, const int8_t* codes, int64_t row, int64_t M, Sums* sums) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) dot_tokens<4>(dense, codes + m * row, row, sums + m);
  for (; m < M; ++m) dot_tokens<1>(dense, codes + m * row, row, sums + m);
}

inline Vec columns_of(const Sums& sums, int64_t n) { return vcvtq_f32_s32(vld1q_s32(sums.lane + n)); }

using Integers = int8x16_t;
constexpr int64_t kRegisters = 16, kBlock = 64;
inline Integers load_integers(const char* p) { return vld1q_s8(reinterpret_cast<const int8_t*>(p)); }
inline void store_integers(char* p, Integers v) { vst1q_s8(reinterpret_cast<int8_t*>(p), v); }
inline Integers broadcast_integers(uint32_t bits) { return vreinterpretq_s8_u32(vdupq_n_u32(bits)); }
inline Integers dot(Integers w, Integers x, Integers sum) {
  return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sum), w, x));
}

float quantize(const float* x, int64_t K, const float* x_scale, void* codes) {
  int8_t* q = static_cast<int8_t*>(codes);
  Vec top = zero();
  for (int64_t k = 0; k < K && !x_scale; k += kLanes)
    top = vmaxnmq_f32(top, abs(K - k < kLanes ? load_first(x + k, K - k) : load(x + k)));  // leaves out NaN
  const float most = vmaxnmvq_f32(top);
  const float step = x_scale ? *x_scale : (most > 1e-12f ? most : 1e-12f) / 127.0f;
  const Vec inverse = broadcast(1.0f / step);
  for (int64_t k = 0; k < (K + kTile - 1) / kTile * kTile; k += kLanes) {
    const int64_t left = K - k;
    const Vec v = left >= kLanes ? load(x + k) : load_first(x + k, left);
    const Vec inside = vminnmq_f32(vmaxnmq_f32(mul(v, inverse), broadcast(-128.0f)), broadcast(127.0f));
    const int32x4_t code = vcvtnq_s32_f32(inside);  // NaN became -128
    for (int i = 0; i < 4; ++i) q[k + i] = static_cast<int8_t>(code[i]);
  }
  return step;
}

}  // namespace
}  // namespace optimize::sparse_matmul

#include "s8_simd.h"

namespace optimize::sparse_matmul {

const S8Kernels* s8_neon() { return &kKernels; }

}  // namespace optimize::sparse_matmul
