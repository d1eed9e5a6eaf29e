// CUDA kernels of SparseMatMul: y = activation(x W + bias). Knows no framework.
//
// Stored form as in ../sparse_matmul.h (64 x 64 tiles, bitmap, values, offsets), with layouts of its own that
// give every lane what it needs in the order in which it needs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include <cuda_runtime_api.h>

namespace optimize::sparse_matmul::cuda {

// mma16   unstructured, 16-bit values (decode.cu)
// mma8    unstructured, int8 values (decode.cu)
// sp16    2:4 along K, 16-bit values (sparse24.cu)
enum class Layout : int32_t { mma16 = 16, mma8 = 17, sp16 = 18 };

enum class Type : int32_t { f16 = 0, bf16 = 1 };  // of x, y and bias, and of values but for mma8

// All pointers are device memory. `activation` as in ../sparse_matmul.h.
struct Weight {
  int64_t K, N;
  Layout layout;
  Type type;
  int32_t activation;
  const uint8_t* bitmap;    // [T, 512], 16-byte aligned
  const void* values;       // 16-byte aligned; tiles start at multiples of 16 bytes
  const int32_t* offsets;   // [T + 1], in values
  const void* bias;         // [N] of `type`, or null
  const float* scale = nullptr;    // [N], mma8: W = values * scale[n]
  const float* x_scale = nullptr;  // [1], mma8: x is quantized with this scale; null = one per token
};

// Bytes of device scratch that run() needs for M tokens (sums of shares of K, codes of x), 256-byte aligned.
size_t workspace_bytes(const Weight& weight, int64_t M);

// Enqueues y [M, N] = activation(x [M, K] W + bias) on `stream`; x and y row-major, dense, 16-byte aligned. Any
// M >= 0, any K and N (tails are handled inside). No allocation, no synchronization: may be captured in a graph.
// Deterministic: the same inputs give the same bits. Returns the error of the launch.
cudaError_t run(const Weight& weight, const void* x, int64_t M, void* y, void* workspace, cudaStream_t stream);

}  // namespace optimize::sparse_matmul::cuda
