// What the two kernels for few tokens share. Y^T = W^T X^T: a block computes a strip of 64 columns for up to 16 tokens
// over a share of K; its warps take tiles of W in turn, and the shares are summed by a second kernel, in order.
#pragma once

#include "kernels.h"
#include "ptx.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kTile = 64, kWarps = 4, kMostTokens = 16;

__device__ __forceinline__ float activate(int kind, float v) {
  switch (kind) {
    case 1:
      return v < 0.0f ? 0.0f : v;  // not a number stays one
    case 2:
      return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case 3:
      return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case 4:
      return v / (1.0f + expf(-v));
    default:
      return v;
  }
}

// Two neighbours of x, zero outside of it.
__device__ __forceinline__ uint32_t two_of(const uint16_t* x, int64_t row, int64_t k, int64_t rows, int64_t K) {
  if (row >= rows || k >= K) return 0;
  const uint16_t* at = x + row * K + k;
  if (K % 2 == 0) return __ldg(reinterpret_cast<const uint32_t*>(at));
  const uint32_t high = k + 1 < K ? at[1] : 0;
  return at[0] | high << 16;
}

// Sums of the block's warps, in their order, to parts [splits][M][N]. `memory` is all of the block's shared memory, which
// must hold 64 of them for each warp and token.
template <int kTokenTiles, typename Sum>
__device__ __forceinline__ void write_sums(const Sum (&sums)[4][kTokenTiles][4], unsigned char* memory, int64_t strip,
                                           int64_t first_token, int64_t M, int64_t N, Sum* parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int kTokens = kTokenTiles * 8;
  Sum* shared = reinterpret_cast<Sum*>(memory);  // [kWarps][kTokens][64]
  __syncthreads();
#pragma unroll
  for (int nb = 0; nb < 4; ++nb)
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = nb * 16 + g + i / 2 * 8, token = tile * 8 + 2 * t + i % 2;
        shared[(warp * kTokens + token) * kTile + n] = sums[nb][tile][i];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * kTile; i += kWarps * 32) {
    const int64_t token = first_token + i / kTile, column = strip * kTile + i % kTile;
    if (token >= M || column >= N) continue;
    Sum sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[w * kTokens * kTile + i];
    parts[(blockIdx.y * M + token) * N + column] = sum;
  }
}

// `steps` [M]: of int8 sums, the value of one step of each token's codes.
template <typename T, typename Sum>
__global__ void finish(Weight w, const Sum* parts, int splits, int64_t M, const float* steps, T* y) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= M * w.N) return;
  Sum sum = 0;
  for (int s = 0; s < splits; ++s) sum += parts[s * M * w.N + i];
  float v = static_cast<float>(sum);
  if (steps) v *= w.scale[i % w.N] * steps[i / w.N];
  if (w.bias) v += static_cast<float>(static_cast<const T*>(w.bias)[i % w.N]);
  y[i] = static_cast<T>(activate(w.activation, v));
}

// Shares of K, such that `resident` blocks per multiprocessor are there to run.
inline int splits_of(const Weight& w, int64_t M, int64_t resident) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t strips = (w.N + kTile - 1) / kTile, chunks = (M + kMostTokens - 1) / kMostTokens;
  const int64_t most = (w.K + kTile * kWarps - 1) / (kTile * kWarps);  // a tile for each warp
  const int64_t splits = resident * processors / (strips * chunks);
  return static_cast<int>(splits < 1 ? 1 : splits > most ? most : splits);
}

// Runs `kernel` over strips, shares of K and groups of 16 tokens, then the sum of the shares. x as the kernel takes it.
template <typename T, typename X, typename Sum>
cudaError_t launch_strips(void (*kernel)(Weight, const X*, int64_t, Sum*), int bytes, int splits, const Weight& w,
                          const X* x, int64_t M, void* y, Sum* parts, const float* steps, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((w.N + kTile - 1) / kTile), static_cast<unsigned>(splits),
                  static_cast<unsigned>((M + kMostTokens - 1) / kMostTokens));
  OPTIMIZE_LAUNCH(kernel, grid, dim3(kWarps * 32), static_cast<size_t>(bytes), stream, w, x, M, parts);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  T* to = static_cast<T*>(y);
  const dim3 blocks(static_cast<unsigned>((M * w.N + 255) / 256));
  const auto last = finish<T, Sum>;
  OPTIMIZE_LAUNCH(last, blocks, dim3(256), 0, stream, w, parts, splits, M, steps, to);
  return cudaGetLastError();
}

}  // namespace

// Codes of x for int8 weights: [M][K rounded up to 64] and the value of one step of each token.
cudaError_t quantize(const Weight& w, const void* x, int64_t M, int8_t* codes, float* steps, cudaStream_t stream);

// Shares of K, and the products; `parts` has splits * M * N numbers of four bytes.
int decode_splits(const Weight& w, int64_t M);
cudaError_t decode_mma16(const Weight& w, const void* x, int64_t M, void* y, void* parts, cudaStream_t stream);
cudaError_t decode_mma8(const Weight& w, const int8_t* codes, const float* steps, int64_t M, void* y, void* parts,
                        cudaStream_t stream);
int decode_sp16_splits(const Weight& w, int64_t M);
cudaError_t decode_sp16(const Weight& w, const void* x, int64_t M, void* y, void* parts, cudaStream_t stream);
// Any M, without workspace.
cudaError_t prefill_sp16(const Weight& w, const void* x, int64_t M, void* y, cudaStream_t stream);

}  // namespace optimize::sparse_matmul::cuda
