// What benchmarks/gpu.py and tests/test_cuda_emulation.py call through ctypes. Pointers are device memory.
#include <string>

#include "common.h"

using namespace optimize::sparse_matmul::cuda;

#define OPTIMIZE_EXPORT extern "C" __attribute__((visibility("default")))

// As Weight, with plain members only (see optimizer/custom_ops/cuda_layout.py).
struct OptimizeCudaWeight {
  int64_t K, N;
  int32_t layout, type, activation, most_values;
  const void *bitmap, *values, *offsets, *bias, *scale, *x_scale;
  void* arrivals;
};

namespace {

Weight weight(const OptimizeCudaWeight& w) {
  return Weight{w.K,
                w.N,
                static_cast<Layout>(w.layout),
                static_cast<Type>(w.type),
                w.activation,
                static_cast<const uint8_t*>(w.bitmap),
                w.values,
                static_cast<const int32_t*>(w.offsets),
                w.bias,
                static_cast<const float*>(w.scale),
                static_cast<const float*>(w.x_scale),
                w.most_values,
                static_cast<uint32_t*>(w.arrivals)};
}

// Reads all of it once and writes nothing (unless the numbers happen to add up to this one): the rate at which memory
// can be read.
__global__ void __launch_bounds__(256) read_all(const uint4* from, int64_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    const uint4 a = __ldg(from + i), b = __ldg(from + i + step), c = __ldg(from + i + 2 * step);
    const uint4 d = __ldg(from + i + 3 * step);
    sum += (a.x ^ b.y ^ c.z ^ d.w) + (a.y ^ b.x ^ c.w ^ d.z) + (a.z ^ b.w ^ c.x ^ d.y) + (a.w ^ b.z ^ c.y ^ d.x);
  }
  for (; i < count; i += step) {
    const uint4 a = __ldg(from + i);
    sum += a.x ^ a.y ^ a.z ^ a.w;
  }
  if (sum == 0x9e3779b9u) *sink = sum;
}

}  // namespace

OPTIMIZE_EXPORT int64_t optimize_cuda_workspace(const OptimizeCudaWeight* w, int64_t M) {
  return static_cast<int64_t>(workspace_bytes(weight(*w), M));
}

// Into how many splits K is cut on this machine.
OPTIMIZE_EXPORT int32_t optimize_cuda_splits(const OptimizeCudaWeight* w, int64_t M) {
  return splits_here(weight(*w), M);
}

// Null if the weight, whose arrays are in the host's memory, is sound; else the reason (until the next call).
OPTIMIZE_EXPORT const char* optimize_cuda_validate(const OptimizeCudaWeight* w, int64_t bitmap_bytes,
                                                   int64_t num_values, int64_t num_offsets) {
  static thread_local std::string reason;
  reason = validate(weight(*w), bitmap_bytes, num_values, num_offsets);
  return reason.empty() ? nullptr : reason.c_str();
}

// Reads `bytes` (a multiple of 16) from `from` on; `sink` is 4 bytes. Null, or what went wrong.
OPTIMIZE_EXPORT const char* optimize_cuda_read(const void* from, int64_t bytes, void* sink, void* stream) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const cudaError_t error = launch(read_all, dim3(static_cast<unsigned>(processors * 8)), 256, 0,
                                   static_cast<cudaStream_t>(stream), static_cast<const uint4*>(from), bytes / 16,
                                   static_cast<uint32_t*>(sink));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null, or what went wrong.
OPTIMIZE_EXPORT const char* optimize_cuda_run(const OptimizeCudaWeight* w, const void* x, int64_t M, void* y,
                                              void* workspace, void* stream) {
  const cudaError_t error = run(weight(*w), x, M, y, workspace, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
