// What benchmarks/gpu.py calls through ctypes. Pointers are device memory.
#include "kernels.h"

using namespace optimize::sparse_matmul::cuda;

#define OPTIMIZE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

Weight weight(int64_t K, int64_t N, int32_t layout, int32_t type, int32_t activation, const void* bitmap,
              const void* values, const void* offsets, const void* bias) {
  return Weight{K,      N,
                static_cast<Layout>(layout), static_cast<Type>(type),
                activation, static_cast<const uint8_t*>(bitmap),
                values, static_cast<const int32_t*>(offsets),
                bias};
}

}  // namespace

OPTIMIZE_EXPORT int64_t optimize_cuda_workspace(int64_t K, int64_t N, int32_t layout, int64_t M) {
  return static_cast<int64_t>(workspace_bytes(weight(K, N, layout, 0, 0, nullptr, nullptr, nullptr, nullptr), M));
}

// Null, or what went wrong.
OPTIMIZE_EXPORT const char* optimize_cuda_run(int64_t K, int64_t N, int32_t layout, int32_t type, int32_t activation,
                                              const void* bitmap, const void* values, const void* offsets,
                                              const void* bias, const void* x, int64_t M, void* y, void* workspace,
                                              void* stream) {
  const cudaError_t error = run(weight(K, N, layout, type, activation, bitmap, values, offsets, bias), x, M, y,
                                workspace, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
