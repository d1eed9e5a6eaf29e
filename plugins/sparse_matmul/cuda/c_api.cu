// What benchmarks/gpu.py calls through ctypes. Pointers are device memory.
#include "kernels.h"

using namespace optimize::sparse_matmul::cuda;

#define OPTIMIZE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

Weight weight(int64_t K, int64_t N, int32_t layout, int32_t type, int32_t activation, const void* bitmap,
              const void* values, const void* offsets, const void* bias, const float* scale, const float* x_scale) {
  return Weight{K,      N,
                static_cast<Layout>(layout), static_cast<Type>(type),
                activation, static_cast<const uint8_t*>(bitmap),
                values, static_cast<const int32_t*>(offsets),
                bias,   scale,
                x_scale};
}

}  // namespace

OPTIMIZE_EXPORT int64_t optimize_cuda_workspace(int64_t K, int64_t N, int32_t layout, int64_t M) {
  Weight w{};
  w.K = K, w.N = N, w.layout = static_cast<Layout>(layout);
  return static_cast<int64_t>(workspace_bytes(w, M));
}

// Null, or what went wrong.
OPTIMIZE_EXPORT const char* optimize_cuda_run(int64_t K, int64_t N, int32_t layout, int32_t type, int32_t activation,
                                              const void* bitmap, const void* values, const void* offsets,
                                              const void* bias, const float* scale, const float* x_scale,
                                              const void* x, int64_t M, void* y, void* workspace, void* stream) {
  const Weight w = weight(K, N, layout, type, activation, bitmap, values, offsets, bias, scale, x_scale);
  const cudaError_t error = run(w, x, M, y, workspace, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
