// Unstructured sparse weights times few tokens: the weights are read as they are stored, and multiplied densely by
// tensor cores.
//
// Layout mma16: position p = ((((nb * 4 + kb) * 2 + h) * 8 + g) * 4 + t) * 4 + e of a 64 x 64 tile is the weight at
// k = 16 t + 4 kb + e, n = 16 nb + 8 h + g. One product (nb, kb) of 16 columns by 16 rows takes, in lane (g, t), two
// groups (h) of four weights: four bits of the bitmap, and the values that belong to them, which lie side by side. The
// lanes of a warp read 128 such weights from one run of values, so that few of them meet in a bank of shared memory. Where
// a group begins follows from a table of the 128 words of the tile's bitmap and the number of values before each.
// The rows of W are taken in another order than in the instruction, and those of X^T in the same order: lane (g, t)
// multiplies 16 neighbours of its token's x.
#include "decode.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kStages = 2;
constexpr int kStageBytes = kTile * kTile * 2 + 16;  // of one tile's values, and what a lane may read after the last one
constexpr int kTableBytes = 128 * 8;
constexpr int kWarpBytes = kStages * kStageBytes + kTableBytes;

__device__ __forceinline__ int count(uint4 bits) { return __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w); }

// 16 neighbours of x from a multiple of 16 on; zero outside of it.
__device__ __forceinline__ void sixteen_of(const uint16_t* x, int64_t row, int64_t k, int64_t rows, int64_t K,
                                           uint32_t* out) {
  if (row < rows && K % 8 == 0 && k + 16 <= K) {
    const uint4* at = reinterpret_cast<const uint4*>(x + row * K + k);
    const uint4 low = __ldg(at), high = __ldg(at + 1);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = two_of(x, row, k + 2 * i, rows, K);
}

// The four weights of which `nibble` says which are stored, as two registers. `run` is the first stored one.
__device__ __forceinline__ void four_of(uint32_t nibble, const uint16_t* run, uint32_t* low, uint32_t* high) {
  const uint32_t bits = nibble * 0x00204081u & 0x01010101u;  // bit e in byte e
  const uint32_t before = bits * 0x01010100u;                // byte e: stored weights before it
  const uint32_t v0 = run[0], v1 = run[before >> 8 & 0xff], v2 = run[before >> 16 & 0xff], v3 = run[before >> 24];
  // Halves that are not stored come from the upper half of what was read, which is zero.
  *low = __byte_perm(v0, v1, 0x7632u - 0x0022u * (bits & 1) - 0x2200u * (bits >> 8 & 1));
  *high = __byte_perm(v2, v3, 0x7632u - 0x0022u * (bits >> 16 & 1) - 0x2200u * (bits >> 24));
}

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kWarps * 32) unstructured(Weight w, const uint16_t* x, int64_t M, float* parts) {
  OPTIMIZE_SHARED(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strip = blockIdx.x, first_token = blockIdx.z * int64_t{kMostTokens};
  const int64_t begin = tiles_k * blockIdx.y / gridDim.y, end = tiles_k * (blockIdx.y + 1) / gridDim.y;
  unsigned char* stages = memory + warp * kWarpBytes;
  uint4* table = reinterpret_cast<uint4*>(stages + kStages * kStageBytes);  // two entries {word, values before it} each
  const uint16_t* values = static_cast<const uint16_t*>(w.values);

  // What says where a tile's values are is read two tiles ahead, and the values one tile ahead.
  struct Place {
    int from, to;
  };
  const auto place_of = [&](int64_t kt) {
    const int64_t tile = strip * tiles_k + kt;
    return kt < end ? Place{__ldg(w.offsets + tile), __ldg(w.offsets + tile + 1)} : Place{0, 0};
  };
  const auto bits_of = [&](int64_t kt) {
    const uint4* at = reinterpret_cast<const uint4*>(w.bitmap + (strip * tiles_k + kt) * 512) + lane;
    return kt < end ? __ldg(at) : uint4{0, 0, 0, 0};
  };
  const auto fetch = [&](Place place, int stage) {
    const unsigned char* source = reinterpret_cast<const unsigned char*>(values + place.from);
    const int bytes = (place.to - place.from) * 2;
    for (int i = lane * 16; i < bytes; i += 512) copy_async(stages + stage * kStageBytes + i, source + i);
    commit_copies();
  };

  float sums[4][kTokenTiles][4] = {};
  uint4 bits = bits_of(begin + warp);
  Place next = place_of(begin + warp + kWarps);
  fetch(place_of(begin + warp), 0);
  int stage = 0;
  for (int64_t kt = begin + warp; kt < end; kt += kWarps, stage ^= 1) {
    fetch(next, stage ^ 1);
    next = place_of(kt + 2 * kWarps);
    const uint4 later = bits_of(kt + kWarps);
    uint32_t b[kTokenTiles][8];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i)
      sixteen_of(x, first_token + i * 8 + g, kt * kTile + 16 * t, M, w.K, b[i]);
    const int own = count(bits);
    int start = own;  // inclusive sum over the lanes up to this one
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, start, d);
      if (lane >= d) start += other;
    }
    const uint32_t first = static_cast<uint32_t>(start - own), second = first + __popc(bits.x),
                   third = second + __popc(bits.y), fourth = third + __popc(bits.z);
    table[lane * 2] = uint4{bits.x, first, bits.y, second};
    table[lane * 2 + 1] = uint4{bits.z, third, bits.w, fourth};
    wait_copies<1>();
    __syncwarp();
    const uint16_t* run = reinterpret_cast<const uint16_t*>(stages + stage * kStageBytes);
    const uint2* entries = reinterpret_cast<const uint2*>(table) + g / 2;
    const int shift = g % 2 * 16 + t * 4;
#pragma unroll
    for (int nb = 0; nb < 4; ++nb)
#pragma unroll
      for (int kb = 0; kb < 4; ++kb) {
        uint32_t a[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint2 entry = entries[((nb * 4 + kb) * 2 + h) * 4];
          const uint32_t before = __popc(entry.x & ((1u << shift) - 1));
          four_of(entry.x >> shift & 15, run + entry.y + before, &a[h], &a[2 + h]);
        }
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) multiply(T{}, sums[nb][i], a, b[i] + 2 * kb);
      }
    __syncwarp();
    bits = later;
  }
  wait_copies<0>();
  write_sums<kTokenTiles>(sums, memory, strip, first_token, M, w.N, parts);
}

constexpr int kBlocksPerProcessor = 3;  // as shared memory allows

template <typename T>
cudaError_t run_as(const Weight& w, const void* x, int64_t M, void* y, float* parts, cudaStream_t stream) {
  const int splits = decode_mma16_splits(w, M);
  constexpr int kBytes = kWarps * kWarpBytes;
  return M <= 8 ? launch_strips<T>(unstructured<T, 1>, kBytes, splits, w, x, M, y, parts, stream)
                : launch_strips<T>(unstructured<T, 2>, kBytes, splits, w, x, M, y, parts, stream);
}

}  // namespace

int decode_mma16_splits(const Weight& w, int64_t M) { return splits_of(w, M, kBlocksPerProcessor); }

cudaError_t decode_mma16(const Weight& w, const void* x, int64_t M, void* y, float* parts, cudaStream_t stream) {
  return w.type == Type::f16 ? run_as<__half>(w, x, M, y, parts, stream)
                             : run_as<__nv_bfloat16>(w, x, M, y, parts, stream);
}

}  // namespace optimize::sparse_matmul::cuda
