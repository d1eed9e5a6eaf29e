// Runs the kernels' own source on the CPU: a C++ compiler and the headers of this folder in place of CUDA's.
//
// A block's threads are fibers (ucontext), which run until they wait for others: at a barrier, or at an instruction of a
// whole warp, which the last lane to arrive carries out for all. What the sources use of CUDA is here, nothing more.
// What is checked beyond the results:
//   - shared memory begins as 0xff (NaN in every float type) and ends at a page that may not be touched;
//   - copies of cp.async arrive as late as they may, at the wait, or at once (OPTIMIZE_EMULATE_COPIES=late|early), so
//     that what is read too early, or written over too early, shows;
//   - the fibers run in several orders (OPTIMIZE_EMULATE_ORDER), so that a missing barrier shows: the first warp as far
//     as it can, then the second and so on (up), from the last thread to the first (down), or all by turns (mixed);
//     blocks run one after the other, in the same orders;
//   - lanes that wait at different instructions, and waits without an end, stop the program.
// Global memory is the caller's: tests put it between pages that may not be touched.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct __half {};
struct __nv_bfloat16 {};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulation {

constexpr size_t kPage = 4096, kStack = 256 * 1024;

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "emulation: %s, block (%u, %u, %u), thread %u\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x);
  std::abort();
}

// Memory that ends where nothing may be read.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : size_((bytes + kPage - 1) / kPage * kPage + kPage) {
    void* made = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) stop("no memory");
    begin_ = static_cast<unsigned char*>(made);
    mprotect(begin_ + size_ - kPage, kPage, PROT_NONE);
    data = begin_ + size_ - kPage - (bytes + 15) / 16 * 16;
  }
  ~Guarded() { munmap(begin_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data;

 private:
  size_t size_;
  unsigned char* begin_;
};

// A number of fibers that meet. Nobody leaves before all have come.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned turn = 0;
  const char* what = nullptr;
  const void* of_lane[32] = {};  // what each lane brought; its results are reached through it
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  ucontext_t context;  // where it begins,
  jmp_buf place;       // and where it waits (jumps are ten times as fast as swapcontext, which calls the kernel)
  bool begun = false, done = false;
  const Meeting* waits = nullptr;
  unsigned turn = 0;
  std::vector<std::vector<Copy>> groups;  // of cp.async, on their way
  std::vector<Copy> open;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  int running = 0;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
};
inline Block* block = nullptr;

inline std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// Threads of a block, or blocks of a grid.
template <typename T>
void put_in_order(std::vector<T>& order) {
  static std::mt19937 random(1);
  const std::string wanted = setting("OPTIMIZE_EMULATE_ORDER");
  if (wanted == "down") std::reverse(order.begin(), order.end());
  if (wanted == "mixed") std::shuffle(order.begin(), order.end(), random);
}

inline unsigned char* shared() { return block->shared; }

// KiB of a multiprocessor; a block may have one less.
inline size_t shared_kib() {
  const std::string value = setting("OPTIMIZE_EMULATE_SHARED");
  return value.empty() ? 100 : static_cast<size_t>(std::stoi(value));
}

inline void meet(Meeting& meeting, const char* what) {
  if (meeting.arrived > 0 && std::strcmp(meeting.what, what) != 0) stop("threads wait at different instructions");
  meeting.what = what;
  ++meeting.arrived;
}
inline void wait_for(Meeting& meeting) {
  Fiber& fiber = block->fibers[block->running];
  fiber.waits = &meeting;
  fiber.turn = meeting.turn;
  if (_setjmp(fiber.place) == 0) _longjmp(block->scheduler, 1);
  block->fibers[block->running].waits = nullptr;
}
inline void leave(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.turn;
}

// An instruction of the whole warp: `act` gets what the 32 lanes brought.
template <typename T, typename F>
void together(const char* what, T& mine, F act) {
  Meeting& warp = block->warps[threadIdx.x / 32];
  warp.of_lane[threadIdx.x % 32] = &mine;
  meet(warp, what);
  if (warp.arrived < 32) return wait_for(warp);
  act([&warp](int lane) -> T& { return *static_cast<T*>(const_cast<void*>(warp.of_lane[lane])); });
  leave(warp);
}

inline void trampoline() {
  (*block->body)();
  block->fibers[block->running].done = true;
  _longjmp(block->scheduler, 1);
}

// Until it waits or ends.
inline void resume(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

inline void prepare(ucontext_t& context, unsigned char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, trampoline, 0);
}

inline void run_block(const std::function<void()>& body, unsigned threads, size_t shared_bytes,
                      std::vector<std::unique_ptr<unsigned char[]>>& stacks) {
  Guarded memory(shared_bytes);
  std::memset(memory.data, 0xff, (shared_bytes + 15) / 16 * 16);
  Block state;
  block = &state;
  state.shared = memory.data;
  state.shared_bytes = shared_bytes;
  state.body = &body;
  state.fibers.resize(threads);
  state.warps.resize(threads / 32);
  for (Meeting& warp : state.warps) warp.size = 32;
  state.all.size = static_cast<int>(threads);
  while (stacks.size() < threads) stacks.push_back(std::make_unique<unsigned char[]>(kStack));
  std::vector<int> order(threads);
  for (unsigned i = 0; i < threads; ++i) {
    order[i] = static_cast<int>(i);
    prepare(state.fibers[i].context, stacks[i].get());
  }
  put_in_order(order);
  // A part of them goes as far as it can before the next one: a warp, or all where warps are mixed.
  const unsigned part = setting("OPTIMIZE_EMULATE_ORDER") == "mixed" ? threads : 32;
  for (size_t left = threads; left > 0;) {
    bool any = false;
    for (unsigned first = 0; first < threads; first += part) {
      for (bool moved = true; moved; any |= moved) {
        moved = false;
        for (unsigned at = first; at < first + part; ++at) {
          Fiber& fiber = state.fibers[order[at]];
          if (fiber.done || (fiber.waits && fiber.waits->turn == fiber.turn)) continue;
          moved = true;
          state.running = order[at];
          threadIdx = dim3(static_cast<unsigned>(order[at]), 0, 0);
          resume(fiber);
          left -= fiber.done;
        }
      }
    }
    if (!any) stop("all threads wait, and not all at the same place");
  }
  block = nullptr;
}

template <typename F>
int launch(dim3 grid, unsigned threads, size_t shared_bytes, F call) {
  static std::vector<std::unique_ptr<unsigned char[]>> stacks;
  if (threads % 32 || threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || !grid.x || !grid.y || !grid.z)
    return 9;  // cudaErrorInvalidConfiguration
  if (shared_bytes > (shared_kib() - 1) * 1024) return 1;  // cudaErrorInvalidValue
  const std::function<void()> body = call;
  gridDim = grid;
  blockDim = dim3(threads);
  std::vector<size_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), size_t{0});
  put_in_order(order);
  for (const size_t i : order) {
    const size_t row = i / grid.x;
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(row % grid.y),
                    static_cast<unsigned>(row / grid.y));
    run_block(body, threads, shared_bytes, stacks);
  }
  return 0;
}

inline void arrive(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}
inline void copy_async(void* to, const void* from, bool valid) {
  static const bool early = setting("OPTIMIZE_EMULATE_COPIES") == "early";
  unsigned char* end = block->shared + (block->shared_bytes + 15) / 16 * 16;
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) stop("cp.async is not aligned");
  if (to < block->shared || static_cast<unsigned char*>(to) + 16 > end) stop("cp.async outside of shared memory");
  const Copy copy{to, from, valid};
  if (early) return arrive(copy);
  block->fibers[block->running].open.push_back(copy);
}
inline void commit_copies() {
  Fiber& fiber = block->fibers[block->running];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
inline void wait_copies(int left) {
  auto& groups = block->fibers[block->running].groups;
  while (groups.size() > static_cast<size_t>(left)) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

// Addresses of shared memory are not those of the host: 1024 is its begin, as it is on some GPUs.
constexpr uint32_t kSharedBegin = 1024;
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - block->shared) + kSharedBegin;
}
template <typename T>
T load_shared(uint32_t address) {
  const uint32_t at = address - kSharedBegin;
  if (address < kSharedBegin || at + sizeof(T) > block->shared_bytes) stop("a load is outside of shared memory");
  if (at % sizeof(T)) stop("a load from shared memory is not aligned");
  T value;
  std::memcpy(&value, block->shared + at, sizeof(T));
  return value;
}

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = select >> (4 * i) & 15;
    if (nibble > 7) stop("prmt in the mode that repeats a sign");
    result |= static_cast<uint32_t>(bytes >> (8 * nibble) & 255) << (8 * i);
  }
  return result;
}

inline void load_matrices(uint32_t* result, const void* row) {
  struct Lane {
    uint32_t* result;
    const unsigned char* row;
  } mine{result, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16) stop("ldmatrix is not aligned");
  together("ldmatrix", mine, [](auto lane) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) std::memcpy(&lane(l).result[m], lane(m * 8 + l / 4).row + l % 4 * 4, 4);
  });
}

}  // namespace emulation

#include "mma.h"

inline void __syncwarp() {
  int nothing = 0;
  emulation::together("__syncwarp", nothing, [](auto) {});
}
inline void __syncthreads() {
  emulation::Meeting& all = emulation::block->all;
  emulation::meet(all, "__syncthreads");
  if (all.arrived < all.size) return emulation::wait_for(all);
  emulation::leave(all);
}
template <typename T>
T shuffled(const char* what, T value, int (*source)(int lane, int by), int by) {
  struct Lane {
    T value, result;
  } mine{value, value};
  emulation::together(what, mine, [=](auto lane) {
    for (int l = 0; l < 32; ++l) lane(l).result = lane(source(l, by)).value;
  });
  return mine.result;
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  return shuffled<T>("__shfl_up_sync", value, [](int l, int d) { return l < d ? l : l - d; }, by);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return shuffled<T>("__shfl_xor_sync", value, [](int l, int d) { return l ^ d; }, by);
}
template <typename T>
T __ldg(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T)) emulation::stop("a load is not aligned");
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return __ldg(at);
}
// Blocks run one after the other, each by one thread of the host.
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* at, uint32_t by) {
  const uint32_t before = *at;
  *at += by;
  return before;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// What the host's side uses of the runtime.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMaxSharedMemoryPerMultiprocessor };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration";
}
// A small GPU, so that small products are split (OPTIMIZE_EMULATE_PROCESSORS), with the shared memory of sm_86 (or
// OPTIMIZE_EMULATE_SHARED KiB).
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  const std::string processors = emulation::setting("OPTIMIZE_EMULATE_PROCESSORS");
  const int all = static_cast<int>(emulation::shared_kib());
  *value = attribute == cudaDevAttrMultiProcessorCount            ? (processors.empty() ? 4 : std::stoi(processors))
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? (all - 1) * 1024
                                                                  : all * 1024;
  return cudaSuccess;
}
