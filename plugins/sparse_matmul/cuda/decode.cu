// Unstructured sparse weights times few tokens: the weights are read as they are stored, and multiplied densely by
// tensor cores. Y^T = W^T X^T: 16 columns of W are the rows of mma.m16n8k16, 8 tokens its columns.
//
// Layout mma16: position = lane * 128 + fragment * 8 + i of a 64 x 64 tile, fragment = (k / 16) * 4 + n / 16, so that
// each lane owns 128 bits and one run of values. With g = lane / 4, c = lane % 4 and i = 4 u + 2 v + e, a lane's weight
// i of a fragment is at k = 8 u + 2 c + e, n = 8 v + g: register 2 u + v of the A operand.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kTile = 64, kWarps = 4, kMostTokens = 16;
constexpr int kTileValues = kTile * kTile;           // at most
constexpr int kStageBytes = kTileValues * 2 + 16;    // one tile's values
constexpr int kStages = 2;

__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}

template <typename T>
__device__ __forceinline__ void multiply(float* d, const uint32_t* a, const uint32_t* b);
template <>
__device__ __forceinline__ void multiply<__half>(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float* d, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two neighbours of x, zero outside of it.
__device__ __forceinline__ uint32_t two_of(const uint16_t* x, int64_t row, int64_t k, int64_t rows, int64_t K) {
  if (row >= rows || k >= K) return 0;
  const uint16_t* at = x + row * K + k;
  if (K % 2 == 0) return __ldg(reinterpret_cast<const uint32_t*>(at));
  const uint32_t high = k + 1 < K ? at[1] : 0;
  return at[0] | high << 16;
}

__device__ __forceinline__ int count(uint4 bits) { return __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w); }

__device__ __forceinline__ float activate(int kind, float v) {
  switch (kind) {
    case 1:
      return fmaxf(v, 0.0f);
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

// One block: one strip of 64 columns, one share of the tiles along K, up to 16 tokens. parts [splits][M][N].
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kWarps * 32) strip_products(Weight w, const uint16_t* x, int64_t M, float* parts) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strip = blockIdx.x, first_token = blockIdx.z * int64_t{kMostTokens};
  const int64_t begin = tiles_k * blockIdx.y / gridDim.y, end = tiles_k * (blockIdx.y + 1) / gridDim.y;
  unsigned char* stages = memory + warp * kStages * kStageBytes;
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
    commit();
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
    const int own = count(bits);
    int start = own;  // inclusive sum over the lanes up to this one
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, start, d);
      if (lane >= d) start += other;
    }
    wait<1>();
    __syncwarp();
    const uint16_t* run = reinterpret_cast<const uint16_t*>(stages + stage * kStageBytes) + (start - own);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int fk = 0; fk < 4; ++fk) {
      uint32_t b[kTokenTiles][2];
      const int64_t k = kt * kTile + fk * 16 + 2 * c;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        b[t][0] = two_of(x, first_token + t * 8 + g, k, M, w.K);
        b[t][1] = two_of(x, first_token + t * 8 + g, k + 8, M, w.K);
      }
#pragma unroll
      for (int fn = 0; fn < 4; ++fn) {
        const uint32_t byte = words[fk] >> (fn * 8);
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t low = byte >> (2 * r) & 1, high = byte >> (2 * r + 1) & 1;
          const uint32_t v0 = run[0], v1 = run[low];
          a[r] = (low ? v0 : 0) | (high ? v1 << 16 : 0);
          run += low + high;
        }
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) multiply<T>(sums[fn][t], a, b[t]);
      }
    }
    __syncwarp();
    bits = later;
  }
  wait<0>();
  __syncthreads();
  // Sums of the block's warps, in the order of the warps.
  float* shared = reinterpret_cast<float*>(memory);  // [kWarps][kTokenTiles * 8][64]
#pragma unroll
  for (int fn = 0; fn < 4; ++fn)
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = fn * 16 + g + i / 2 * 8, token = t * 8 + 2 * c + i % 2;
        shared[(warp * kTokenTiles * 8 + token) * kTile + n] = sums[fn][t][i];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokenTiles * 8 * kTile; i += kWarps * 32) {
    const int64_t token = first_token + i / kTile, column = strip * kTile + i % kTile;
    if (token >= M || column >= w.N) continue;
    float sum = 0;
    for (int v = 0; v < kWarps; ++v) sum += shared[v * kTokenTiles * 8 * kTile + i];
    parts[(blockIdx.y * M + token) * w.N + column] = sum;
  }
}

template <typename T>
__global__ void finish(Weight w, const float* parts, int splits, int64_t M, T* y) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= M * w.N) return;
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += parts[s * M * w.N + i];
  if (w.bias) sum += static_cast<float>(static_cast<const T*>(w.bias)[i % w.N]);
  y[i] = static_cast<T>(activate(w.activation, sum));
}

int splits_of(const Weight& w, int64_t M) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t strips = (w.N + kTile - 1) / kTile, chunks = (M + kMostTokens - 1) / kMostTokens;
  const int64_t most = (w.K + kTile * kWarps - 1) / (kTile * kWarps);  // a tile for each warp
  // As many blocks as run at once: a multiprocessor's shared memory holds the stages of three.
  const int64_t splits = int64_t{3} * processors / (strips * chunks);
  return static_cast<int>(splits < 1 ? 1 : splits > most ? most : splits);
}

template <typename T, int kTokenTiles>
cudaError_t launch(const Weight& w, const void* x, int64_t M, void* y, float* parts, cudaStream_t stream) {
  const int splits = splits_of(w, M);
  constexpr int kBytes = kWarps * kStages * kStageBytes;
  const auto kernel = strip_products<T, kTokenTiles>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((w.N + kTile - 1) / kTile), static_cast<unsigned>(splits),
                  static_cast<unsigned>((M + kMostTokens - 1) / kMostTokens));
  kernel<<<grid, kWarps * 32, kBytes, stream>>>(w, static_cast<const uint16_t*>(x), M, parts);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t blocks = (M * w.N + 255) / 256;
  finish<T><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(w, parts, splits, M, static_cast<T*>(y));
  return cudaGetLastError();
}

template <typename T>
cudaError_t run_as(const Weight& w, const void* x, int64_t M, void* y, float* parts, cudaStream_t stream) {
  return M <= 8 ? launch<T, 1>(w, x, M, y, parts, stream) : launch<T, 2>(w, x, M, y, parts, stream);
}

}  // namespace

size_t workspace_bytes(const Weight& w, int64_t M) {
  const size_t bytes = static_cast<size_t>(splits_of(w, M)) * static_cast<size_t>(M * w.N) * sizeof(float);
  return (bytes + 255) / 256 * 256;
}

cudaError_t run(const Weight& w, const void* x, int64_t M, void* y, void* workspace, cudaStream_t stream) {
  if (M == 0) return cudaSuccess;
  if (w.layout != Layout::mma16) return cudaErrorNotSupported;
  float* parts = static_cast<float*>(workspace);
  return w.type == Type::f16 ? run_as<__half>(w, x, M, y, parts, stream)
                             : run_as<__nv_bfloat16>(w, x, M, y, parts, stream);
}

}  // namespace optimize::sparse_matmul::cuda
