// What the kernels take from the hardware, as functions: asynchronous copies and tensor-core products. Compiled by
// another compiler than nvcc, with emulation/ on the include path, the same kernels run on the CPU, where these functions
// follow the tables of fragments in NVIDIA's PTX ISA ("Matrix Fragments for mma.m16n8k16", "Sparse Matrix Fragments for
// mma.m16n8k32"): a lane has g = lane / 4 and t = lane % 4, and
//   A 16 x 16   register 2 u + v holds rows g + 8 v, columns 8 u + 2 t and the next one (of the stored ones, if sparse)
//   B 16 x 8    register u holds rows 8 u + 2 t and the next one, column g
//   D 16 x 8    element 2 v + e is at row g + 8 v, column 2 t + e
//   int8 A 16 x 32, B 32 x 8   register 2 u + v of A holds row g + 8 v, columns 16 u + 4 t and the next three; register u of
//               B rows 16 u + 4 t and the next three, column g ("mma.m16n8k32")
//   metadata    lanes with t < 2: bits 16 v + 4 q + 2 e are the place, within its group of four, of stored element e of
//               group 4 t + q of row g + 8 v (selector 0)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifndef __CUDACC__
#include "emulation.h"
#endif

namespace optimize::sparse_matmul::cuda {
namespace {

#ifdef __CUDACC__

#define OPTIMIZE_LAUNCH(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define OPTIMIZE_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// 16 bytes from global to shared memory, both aligned to 16; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Until all but the last kLeft groups of this thread's copies are there.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}

#define OPTIMIZE_MMA(type, name)                                                                                     \
  __device__ __forceinline__ void multiply(type, float* d, const uint32_t* a, const uint32_t* b) {                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"  \
                 "{%0,%1,%2,%3};"                                                                                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                \
  }                                                                                                                  \
  __device__ __forceinline__ void multiply_sparse(type, float* d, const uint32_t* a, const uint32_t* b,              \
                                                  uint32_t metadata) {                                               \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." name "." name ".f32 {%0,%1,%2,%3},"   \
                 "{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,0x0;"                                              \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),           \
                   "r"(metadata));                                                                                   \
  }
// D += A B, of 16 x 16 by 16 x 8, and the same with a 2:4 sparse A of 16 x 32 by 32 x 8.
OPTIMIZE_MMA(__half, "f16")
OPTIMIZE_MMA(__nv_bfloat16, "bf16")
#undef OPTIMIZE_MMA

// D += A B of int8, 16 x 32 by 32 x 8.
__device__ __forceinline__ void multiply_int8(int32_t* d, const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

#define OPTIMIZE_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  (static_cast<void>(stream), emulation::launch(grid, block, bytes, [=] { kernel(__VA_ARGS__); }))
#define OPTIMIZE_SHARED(name) unsigned char* const name = emulation::shared_memory()

inline void copy_async(void* to, const void* from, bool valid = true) { emulation::copy_later(to, valid ? from : nullptr); }
inline void commit_copies() { emulation::commit_copies(); }
template <int kLeft>
void wait_copies() {
  emulation::wait_copies(kLeft);
}

struct Registers {
  uint32_t a[4], b[4], metadata;
};

template <typename T>
float element(uint32_t word, int64_t half) {
  T value;
  value.bits = static_cast<uint16_t>(word >> (16 * half));
  return static_cast<float>(value);
}

// Sums of this lane; `depth` rows of B, `place(row, c)` the row of B that stored column c of a row of A belongs to.
template <typename T, typename Place>
void products(float* d, const Registers* lanes, const Place& place) {
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int c = 0; c < 16; ++c) {
      const int k = place(row, c);
      const float a = element<T>(lanes[row % 8 * 4 + c % 8 / 2].a[c / 8 * 2 + row / 8], c % 2);
      const float b = element<T>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      d[i] += a * b;
    }
  }
}

template <typename T>
void multiply(T, float* d, const uint32_t* a, const uint32_t* b) {
  const auto lanes = emulation::exchange(Registers{{a[0], a[1], a[2], a[3]}, {b[0], b[1], 0, 0}, 0});
  products<T>(d, lanes.data(), [](int, int c) { return c; });
}

template <typename T>
void multiply_sparse(T, float* d, const uint32_t* a, const uint32_t* b, uint32_t metadata) {
  const auto lanes = emulation::exchange(Registers{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata});
  const auto index = [&](int row, int c) {
    const int q = c / 2;
    const uint32_t word = lanes[row % 8 * 4 + q / 4].metadata;
    return static_cast<int>(word >> (row / 8 * 16 + q % 4 * 4 + c % 2 * 2) & 3);
  };
  products<T>(d, lanes.data(), [&](int row, int c) {
    // The order of the two places of a group is part of the instruction's contract.
    if (index(row, c / 2 * 2) >= index(row, c / 2 * 2 + 1)) emulation::fail("metadata is not in order");
    return c / 2 * 4 + index(row, c);
  });
}

inline void multiply_int8(int32_t* d, const uint32_t* a, const uint32_t* b) {
  const auto lanes = emulation::exchange(Registers{{a[0], a[1], a[2], a[3]}, {b[0], b[1], 0, 0}, 0});
  const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
  const auto byte = [](uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i) & 0xff); };
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      const size_t owner = static_cast<size_t>(k % 16 / 4);
      const uint32_t left = lanes[static_cast<size_t>(row % 8) * 4 + owner].a[k / 16 * 2 + row / 8];
      const uint32_t right = lanes[static_cast<size_t>(column) * 4 + owner].b[k / 16];
      d[i] += byte(left, k % 4) * byte(right, k % 4);
    }
  }
}

#endif

}  // namespace
}  // namespace optimize::sparse_matmul::cuda
