// What the kernels share: the call, the end of a product, and what each file offers to run.cu.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels.h"
#include "ptx.h"

namespace optimize::sparse_matmul::cuda {

constexpr int kTile = 64;          // rows and columns of a tile
constexpr int kFewTokens = 16;     // most of a block of the kernels for few tokens
constexpr int64_t kMostRows = int64_t{1} << 19;  // of one launch: grids have limits

// What a product needs besides the weight.
struct Call {
  const void* x;       // [M, stride] 16-bit numbers, or int8 codes (mma8, sp8; zeros from K to stride)
  int64_t M;
  int64_t stride;      // K, or K rounded up to 64 for codes
  const float* steps;  // [M] scale of every token's codes
  void* y;             // [M, N]
  void* parts;         // [splits, M, N] sums (float, or int32 for codes), where there are several splits
  uint32_t* arrivals;  // [strips] how many splits of a strip are done; null = sum_of_parts adds them up
};

// How a product is cut; `splits` share the tiles along K.
struct Plan {
  dim3 grid;
  int threads, splits, stages, stage_bytes, shared_bytes;
};

struct Machine {
  int processors, shared_block, shared_processor;  // bytes of shared memory that a block may have, and in all
};

// Into how many splits the tiles along K are cut, for kernels of few tokens: `strips` blocks for each split, whose warps
// take tiles in turns; `resident` blocks run on a multiprocessor at once. Enough blocks to fill four fifths of the
// places, then what leaves the busiest multiprocessor the least to do: its blocks, each with the tiles of its busiest
// warp and half a tile's time to begin and end.
inline int splits_for(int64_t strips, int64_t tiles_k, int warps, int64_t resident, int processors) {
  const int64_t most = (tiles_k + warps - 1) / warps, places = resident * processors;
  int64_t least = (4 * places + 5 * strips - 1) / (5 * strips), best = 1, best_cost = 0;
  least = least > most ? most : least;
  if (least <= 1) return 1;
  for (int64_t s = least; s <= 2 * least && s <= most; ++s) {
    const int64_t blocks = (strips * s + processors - 1) / processors;
    const int64_t tiles = (tiles_k + s * warps - 1) / (s * warps), cost = blocks * (2 * tiles + 1);
    if (s == least || cost < best_cost) best = s, best_cost = cost;
  }
  return static_cast<int>(best);
}

inline bool is_int8(const Weight& w) { return is_int8(w.layout); }
inline bool is_sparse24(const Weight& w) { return w.layout == Layout::sp16 || w.layout == Layout::sp8; }

Plan plan_decode(const Weight& w, int64_t M, const Machine& machine);
// That this machine's plan has.
int splits_here(const Weight& w, int64_t M);
Plan plan_sparse24(const Weight& w, int64_t M, const Machine& machine);
cudaError_t run_decode(const Weight& w, const Call& call, const Plan& plan, cudaStream_t stream);
cudaError_t run_sparse24(const Weight& w, const Call& call, const Plan& plan, cudaStream_t stream);
// Codes [M, stride] and steps [M] of x [M, K].
cudaError_t quantize(const Weight& w, const void* x, int64_t M, int64_t stride, int8_t* codes, float* steps,
                     cudaStream_t stream);
// Sums of the splits, in their order, and the end of the product.
cudaError_t finish(const Weight& w, const Call& call, int splits, cudaStream_t stream);

template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

__device__ __forceinline__ float to_float(Type type, uint16_t bits) {
  return type == Type::f16 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
}
__device__ __forceinline__ uint16_t from_float(Type type, float value) {
  return type == Type::f16 ? __half_as_ushort(__float2half_rn(value))
                           : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ __forceinline__ float activate(int kind, float v) {
  switch (kind) {
    case 1:
      return v < 0.0f ? 0.0f : v;  // NaN stays
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

// y[token, column] of the sum over all of K.
template <typename Sum>
__device__ __forceinline__ void store(const Weight& w, const Call& call, int64_t token, int64_t column, Sum sum) {
  float v = static_cast<float>(sum);
  if constexpr (std::is_same_v<Sum, int32_t>) v = v * __ldg(call.steps + token) * __ldg(w.scale + column);
  if (w.bias) v += to_float(w.type, __ldg(static_cast<const uint16_t*>(w.bias) + column));
  static_cast<uint16_t*>(call.y)[token * w.N + column] = from_float(w.type, activate(w.activation, v));
}

// y[token, column], or this split's part of it.
template <typename Sum>
__device__ __forceinline__ void deliver(const Weight& w, const Call& call, int split, int splits, int64_t token,
                                        int64_t column, Sum sum) {
  if (splits == 1) return store(w, call, token, column, sum);
  static_cast<Sum*>(call.parts)[(split * call.M + token) * w.N + column] = sum;
}

// The last of a strip's blocks to arrive adds up the parts of all in the order of the splits, so that the result does
// not depend on which it is, and leaves the count as it was found. `memory` is shared memory that is free again after a
// barrier.
template <typename Sum>
__device__ __forceinline__ void finish_if_last(const Weight& w, const Call& call, unsigned char* memory, int64_t strip,
                                               int splits) {
  __threadfence();  // the parts, before the count
  __syncthreads();
  unsigned* before = reinterpret_cast<unsigned*>(memory);
  if (threadIdx.x == 0) *before = atomicAdd(call.arrivals + strip, 1u);
  __syncthreads();
  if (*before + 1 != static_cast<unsigned>(splits)) return;
  __threadfence();
  const Sum* parts = static_cast<const Sum*>(call.parts);
  for (int64_t i = threadIdx.x; i < call.M * kTile; i += blockDim.x) {
    const int64_t token = i / kTile, column = strip * kTile + i % kTile;
    if (column >= w.N) continue;
    Sum sum = 0;
    for (int s = 0; s < splits; ++s) sum += __ldcg(parts + (s * call.M + token) * w.N + column);
    store(w, call, token, column, sum);
  }
  if (threadIdx.x == 0) call.arrivals[strip] = 0;
}

// What a block of few tokens computed for a strip: the sums of its warps, added in the order of the warps. `memory` is
// shared memory that nobody uses any more, with room for [warps][kTokenTiles * 8][64] sums.
template <typename Sum, int kTokenTiles>
__device__ __forceinline__ void deliver_warps(const Weight& w, const Call& call, unsigned char* memory, int64_t strip,
                                              int64_t first_token, const Sum (&sums)[4][kTokenTiles][4]) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Sum* shared = reinterpret_cast<Sum*>(memory);
#pragma unroll
  for (int nb = 0; nb < 4; ++nb)
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int n = nb * 16 + g + r / 2 * 8, token = i * 8 + 2 * t + r % 2;
        shared[(warp * kTokenTiles * 8 + token) * kTile + n] = sums[nb][i][r];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokenTiles * 8 * kTile; i += blockDim.x) {
    const int64_t token = first_token + i / kTile, column = strip * kTile + i % kTile;
    if (token >= call.M || column >= w.N) continue;
    Sum sum = 0;
    for (int v = 0; v < warps; ++v) sum += shared[v * kTokenTiles * 8 * kTile + i];
    deliver(w, call, blockIdx.y, gridDim.y, token, column, sum);
  }
  if (call.arrivals) finish_if_last<Sum>(w, call, memory, strip, gridDim.y);
}

}  // namespace optimize::sparse_matmul::cuda
