// What CUDA C++ cannot say: instructions of PTX, and the launch of a kernel. Everything here exists twice, as inline
// assembly under nvcc and as a call into emulation/ elsewhere; the kernels themselves are the same source in both.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifdef __CUDACC__
#define OPTIMIZE_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#define OPTIMIZE_SHARED(name) unsigned char* name = emulation::shared()
#endif

namespace optimize::sparse_matmul::cuda {

#ifdef __CUDACC__

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// Shared memory by its own addresses, which are numbers of 32 bits.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ uint32_t load_shared16(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address));
  return value;
}
__device__ __forceinline__ uint32_t load_shared32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// cp.async: 16 bytes from global to shared memory, both aligned to 16; zeros where not `valid`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  const uint32_t address = shared_address(to);
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kLeft groups of this thread have arrived.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Byte i of the result is the byte of {high, low} that nibble i of `select` names (0..7, 0 is the lowest of low).
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t select) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(select));
  return result;
}

// ldmatrix.x4: lane l names row l % 8 (16 bytes of shared memory) of matrix l / 8; it gets bytes 4 (l % 4) ..+3 of row
// l / 4 of each of the four.
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* row) {
  const uint32_t address = shared_address(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(address)
               : "memory");
}

#define OPTIMIZE_MMA(type, sum, letter, instruction)                                                          \
  __device__ __forceinline__ void multiply(type, sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile(instruction " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                            \
                 : "+" letter(d[0]), "+" letter(d[1]), "+" letter(d[2]), "+" letter(d[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
  }
OPTIMIZE_MMA(__half, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
OPTIMIZE_MMA(__nv_bfloat16, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
OPTIMIZE_MMA(int8_t, int32_t, "r", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
#undef OPTIMIZE_MMA

// Since PTX 8.5 metadata in ascending order (ours is) is said to be so; plain .sp is slow on later GPUs.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define OPTIMIZE_SP "mma.sp::ordered_metadata.sync.aligned."
#else
#define OPTIMIZE_SP "mma.sp.sync.aligned."
#endif
#define OPTIMIZE_MMA_SP(type, sum, letter, instruction)                                                              \
  template <int kSelector>                                                                                           \
  __device__ __forceinline__ void multiply_sparse(type, sum (&d)[4], const uint4& a, const uint32_t (&b)[4],         \
                                                  uint32_t metadata) {                                               \
    asm volatile(OPTIMIZE_SP instruction                                                                             \
                 " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,%13;"                               \
                 : "+" letter(d[0]), "+" letter(d[1]), "+" letter(d[2]), "+" letter(d[3])                            \
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),               \
                   "r"(metadata), "n"(kSelector));                                                                   \
  }
OPTIMIZE_MMA_SP(__half, float, "f", "m16n8k32.row.col.f32.f16.f16.f32")
OPTIMIZE_MMA_SP(__nv_bfloat16, float, "f", "m16n8k32.row.col.f32.bf16.bf16.f32")
OPTIMIZE_MMA_SP(int8_t, int32_t, "r", "m16n8k64.row.col.s32.s8.s8.s32")
#undef OPTIMIZE_MMA_SP
#undef OPTIMIZE_SP

#else  // emulated

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  return emulation::launch(grid, threads, shared_bytes, [=] { kernel(arguments...); });
}
inline uint32_t shared_address(const void* pointer) { return emulation::shared_address(pointer); }
inline uint32_t load_shared16(uint32_t address) { return emulation::load_shared<uint16_t>(address); }
inline uint32_t load_shared32(uint32_t address) { return emulation::load_shared<uint32_t>(address); }
inline void copy_async(void* to, const void* from, bool valid = true) { emulation::copy_async(to, from, valid); }
inline void commit_copies() { emulation::commit_copies(); }
template <int kLeft>
void wait_copies() {
  emulation::wait_copies(kLeft);
}
inline uint32_t permute(uint32_t low, uint32_t high, uint32_t select) { return emulation::permute(low, high, select); }
inline void load_matrices(uint32_t (&result)[4], const void* row) { emulation::load_matrices(result, row); }
template <typename T, typename Sum>
void multiply(T, Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply<T>(d, a, b);
}
template <int kSelector, typename T, typename Sum>
void multiply_sparse(T, Sum (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
  emulation::multiply_sparse<T>(d, a, b, metadata, kSelector);
}

#endif

}  // namespace optimize::sparse_matmul::cuda
