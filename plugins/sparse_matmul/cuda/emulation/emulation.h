// Runs kernels on the CPU: every thread of a block is a fiber, blocks run one after the other. Fibers change only at
// barriers and at what lanes of a warp exchange, so that a kernel that lacks a barrier reads what is not there yet.
// Shared memory begins as 0xff, which is not a number in every floating type; asynchronous copies arrive when they are
// waited for, not before.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

[[noreturn]] void fail(const char* text);
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
int lane();
unsigned char* shared_memory();

void block_barrier();
void warp_barrier();
void copy_later(void* to, const void* from);  // 16 bytes; zeros where from is null
void commit_copies();
void wait_copies(int left);

constexpr size_t kSlot = 64;
unsigned char* warp_slot(int lane);

// What every lane of the warp gave.
template <typename T>
std::array<T, 32> exchange(const T& value) {
  static_assert(sizeof(T) <= kSlot);
  std::memcpy(warp_slot(lane()), &value, sizeof value);
  warp_barrier();
  std::array<T, 32> all;
  for (int i = 0; i < 32; ++i) std::memcpy(&all[static_cast<size_t>(i)], warp_slot(i), sizeof(T));
  warp_barrier();
  return all;
}

}  // namespace emulation

#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index()
#define blockDim emulation::block_size()
#define gridDim emulation::grid_size()

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const auto all = emulation::exchange(value);
  return emulation::lane() < delta ? value : all[static_cast<size_t>(emulation::lane() - delta)];
}
template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
