// What benchmarks/gpu.py and tests/test_cuda_emulation.py call through ctypes. Pointers are device memory.
#include "kernels.h"

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

}  // namespace

OPTIMIZE_EXPORT int64_t optimize_cuda_workspace(const OptimizeCudaWeight* w, int64_t M) {
  return static_cast<int64_t>(workspace_bytes(weight(*w), M));
}

// Null, or what went wrong.
OPTIMIZE_EXPORT const char* optimize_cuda_run(const OptimizeCudaWeight* w, const void* x, int64_t M, void* y,
                                              void* workspace, void* stream) {
  const cudaError_t error = run(weight(*w), x, M, y, workspace, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
