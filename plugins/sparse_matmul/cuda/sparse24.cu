// 2:4 sparse weights, which tensor cores multiply as they are stored (mma.sp.m16n8k32).
//
// Layout sp16: position p = (((((kb * 4 + nb) * 2 + u) * 2 + v) * 8 + g) * 4 + t) * 4 + e of a 64 x 64 tile is the weight at
// k = 32 kb + 16 u + 4 t + e, n = 16 nb + 8 v + g. Of each group of four (e) exactly two are stored, zeros among them
// where fewer are not zero: a tile has 2048 values, and register 2 u + v of lane (g, t) is word (2 u + v) * 32 + lane of a
// product's 128 words of values. The bitmap has as many bits as the instruction's metadata: four bits of a group, two
// of them set, become two numbers of two bits.
#include "decode.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kValueWords = kTile * kTile / 4;  // of one tile: two 16-bit values in a word
constexpr int kProducts = 8;                    // of a tile: (kb, nb)

// Metadata of eight groups from their eight times four bits: place of the lower bit, then of the upper one.
__device__ __forceinline__ uint32_t metadata_of(uint32_t bits) {
  const uint32_t b0 = bits, b1 = bits >> 1, b2 = bits >> 2, b3 = bits >> 3, ones = 0x11111111u;
  const uint32_t low0 = ~b0 & b1 & ones, low1 = ~b0 & ~b1 & ones;      // the lower place is 0, 1 or 2
  const uint32_t high0 = (b3 | ~b2) & ones, high1 = (b3 | b2) & ones;  // the upper one is 1, 2 or 3
  return low0 | low1 << 1 | high0 << 2 | high1 << 3;
}

// The metadata that lane (g, t) gives to product `product` of a tile: 16 bits of rows g and 16 of g + 8. Only lanes with
// t < 2 are asked.
__device__ __forceinline__ uint32_t metadata_at(const uint16_t* bitmap, int product, int g, int t) {
  const uint16_t* at = bitmap + product * 32 + (t % 2) * 16 + g;
  return metadata_of(static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[8]) << 16);
}

template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kWarps * 32) structured(Weight w, const uint16_t* x, int64_t M, float* parts) {
  OPTIMIZE_SHARED(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strip = blockIdx.x, first_token = blockIdx.z * int64_t{kMostTokens};
  const int64_t begin = tiles_k * blockIdx.y / gridDim.y, end = tiles_k * (blockIdx.y + 1) / gridDim.y;
  float sums[4][kTokenTiles][4] = {};
  for (int64_t kt = begin + warp; kt < end; kt += kWarps) {
    const int64_t tile = strip * tiles_k + kt;
    const uint32_t* values = static_cast<const uint32_t*>(w.values) + __ldg(w.offsets + tile) / 2;
    const uint16_t* bitmap = reinterpret_cast<const uint16_t*>(w.bitmap + tile * 512);
    uint32_t a[kProducts][4], bits[kProducts];
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {  // all of a tile is on its way before the first product
#pragma unroll
      for (int r = 0; r < 4; ++r) a[p][r] = __ldg(values + p * 128 + r * 32 + lane);
      const uint16_t* at = bitmap + p * 32 + (t % 2) * 16 + g;
      bits[p] = static_cast<uint32_t>(__ldg(at)) | static_cast<uint32_t>(__ldg(at + 8)) << 16;
    }
#pragma unroll
    for (int kb = 0; kb < 2; ++kb)
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        uint32_t b[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          b[r] = two_of(x, first_token + i * 8 + g, kt * kTile + kb * 32 + r * 8 + 2 * t, M, w.K);
#pragma unroll
        for (int nb = 0; nb < 4; ++nb)
          multiply_sparse(T{}, sums[nb][i], a[kb * 4 + nb], b, metadata_of(bits[kb * 4 + nb]));
      }
  }
  write_sums<kTokenTiles>(sums, memory, strip, first_token, M, w.N, parts);
}

// Many tokens: a block computes 64 columns of 128 tokens; each warp 32 tokens and all columns. Tiles of W and of x come
// through shared memory, three on their way at a time.
constexpr int kBlockTokens = 128, kTokenTiles32 = 4, kPrefillStages = 3;
constexpr int kRowBytes = kTile * 2 + 16;  // of x in shared memory: 16 bytes more spread its rows over the banks
constexpr int kWeightBytes = kValueWords * 4 + 512;
constexpr int kPrefillStage = kBlockTokens * kRowBytes + kWeightBytes;

template <typename T>
__global__ void __launch_bounds__(kWarps * 32) structured_many(Weight w, const uint16_t* x, int64_t M, T* y) {
  OPTIMIZE_SHARED(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strip = blockIdx.x;
  const int64_t first_token = blockIdx.y * int64_t{kBlockTokens};
  const bool aligned = w.K % 8 == 0;

  const auto fetch = [&](int64_t kt) {
    if (kt < tiles_k) {
      unsigned char* stage = memory + kt % kPrefillStages * kPrefillStage;
      const int64_t tile = strip * tiles_k + kt;
      const unsigned char* values = static_cast<const unsigned char*>(w.values) + int64_t{__ldg(w.offsets + tile)} * 2;
      unsigned char* weights = stage + kBlockTokens * kRowBytes;
      for (int i = threadIdx.x * 16; i < kValueWords * 4; i += kWarps * 512) copy_async(weights + i, values + i);
      for (int i = threadIdx.x * 16; i < 512; i += kWarps * 512)
        copy_async(weights + kValueWords * 4 + i, w.bitmap + tile * 512 + i);
      for (int i = threadIdx.x; i < kBlockTokens * 8; i += kWarps * 32) {  // eight numbers of a row
        const int64_t token = first_token + i / 8, k = kt * kTile + i % 8 * 8;
        unsigned char* to = stage + i / 8 * kRowBytes + i % 8 * 16;
        if (aligned) {
          const bool inside = token < M && k < w.K;
          copy_async(to, inside ? x + token * w.K + k : x, inside);
        } else {
          for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(to)[j] = two_of(x, token, k + 2 * j, M, w.K);
        }
      }
    }
    commit_copies();
  };

  float sums[4][kTokenTiles32][4] = {};
  for (int kt = 0; kt < kPrefillStages - 1; ++kt) fetch(kt);
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    wait_copies<kPrefillStages - 2>();
    __syncthreads();  // tile kt is there for all, and all are done with the one whose place is filled next
    fetch(kt + kPrefillStages - 1);
    const unsigned char* stage = memory + kt % kPrefillStages * kPrefillStage;
    const uint32_t* values = reinterpret_cast<const uint32_t*>(stage + kBlockTokens * kRowBytes);
    const uint16_t* bitmap = reinterpret_cast<const uint16_t*>(values + kValueWords);
#pragma unroll
    for (int kb = 0; kb < 2; ++kb) {
      uint32_t b[kTokenTiles32][4];
#pragma unroll
      for (int i = 0; i < kTokenTiles32; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          b[i][r] = *reinterpret_cast<const uint32_t*>(stage + (warp * 32 + i * 8 + g) * kRowBytes + (kb * 32 + r * 8 + 2 * t) * 2);
#pragma unroll
      for (int nb = 0; nb < 4; ++nb) {
        const int p = kb * 4 + nb;
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = values[p * 128 + r * 32 + lane];
        const uint32_t metadata = metadata_at(bitmap, p, g, t);
#pragma unroll
        for (int i = 0; i < kTokenTiles32; ++i) multiply_sparse(T{}, sums[nb][i], a, b[i], metadata);
      }
    }
  }
  wait_copies<0>();
#pragma unroll
  for (int nb = 0; nb < 4; ++nb)
#pragma unroll
    for (int i = 0; i < kTokenTiles32; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t token = first_token + warp * 32 + i * 8 + 2 * t + j % 2;
        const int64_t column = strip * kTile + nb * 16 + g + j / 2 * 8;
        if (token >= M || column >= w.N) continue;
        float v = sums[nb][i][j];
        if (w.bias) v += static_cast<float>(static_cast<const T*>(w.bias)[column]);
        y[token * w.N + column] = static_cast<T>(activate(w.activation, v));
      }
}

constexpr int kBlocksPerProcessor = 4;

template <typename T>
cudaError_t few_as(const Weight& w, const void* x, int64_t M, void* y, void* parts, cudaStream_t stream) {
  const int splits = decode_sp16_splits(w, M), tokens = M <= 8 ? 8 : 16;
  const auto kernel = M <= 8 ? structured<T, 1> : structured<T, 2>;
  return launch_strips<T>(kernel, kWarps * tokens * kTile * 4, splits, w, static_cast<const uint16_t*>(x), M, y,
                          static_cast<float*>(parts), nullptr, stream);
}

template <typename T>
cudaError_t many_as(const Weight& w, const void* x, int64_t M, void* y, cudaStream_t stream) {
  constexpr int kBytes = kPrefillStages * kPrefillStage;
  const auto kernel = structured_many<T>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((w.N + kTile - 1) / kTile),
                  static_cast<unsigned>((M + kBlockTokens - 1) / kBlockTokens));
  const uint16_t* from = static_cast<const uint16_t*>(x);
  T* to = static_cast<T*>(y);
  OPTIMIZE_LAUNCH(kernel, grid, dim3(kWarps * 32), static_cast<size_t>(kBytes), stream, w, from, M, to);
  return cudaGetLastError();
}

}  // namespace

int decode_sp16_splits(const Weight& w, int64_t M) { return splits_of(w, M, kBlocksPerProcessor); }

cudaError_t decode_sp16(const Weight& w, const void* x, int64_t M, void* y, void* parts, cudaStream_t stream) {
  return w.type == Type::f16 ? few_as<__half>(w, x, M, y, parts, stream)
                             : few_as<__nv_bfloat16>(w, x, M, y, parts, stream);
}

cudaError_t prefill_sp16(const Weight& w, const void* x, int64_t M, void* y, cudaStream_t stream) {
  return w.type == Type::f16 ? many_as<__half>(w, x, M, y, stream) : many_as<__nv_bfloat16>(w, x, M, y, stream);
}

}  // namespace optimize::sparse_matmul::cuda
