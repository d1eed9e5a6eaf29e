#include "emulation.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStack = 64 << 10;

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  dim3 index{0};
  int number = 0;
  bool done = false;
  ucontext_t context{};
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  std::vector<Copy> open;                // copies not committed yet
  std::deque<std::vector<Copy>> groups;  // committed ones
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct State {
  dim3 grid{1}, block{1}, block_at{0};
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  unsigned char* shared_start = nullptr;
  std::vector<Barrier> warps;
  std::vector<unsigned char> slots;
  Barrier whole;
  Thread* current = nullptr;
  ucontext_t scheduler{};
  const std::function<void()>* kernel = nullptr;
};
State state;

void yield() { swapcontext(&state.current->context, &state.scheduler); }

void entry() {
  (*state.kernel)();
  state.current->done = true;
  yield();
}

void arrive(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

int size_of_warp(int warp) {
  const int left = static_cast<int>(state.threads.size()) - warp * 32;
  return left < 32 ? left : 32;
}

void run_block() {
  std::memset(state.shared.data(), 0xff, state.shared.size());
  state.warps.assign((state.threads.size() + 31) / 32, {});
  state.slots.assign(state.warps.size() * 32 * kSlot, 0);
  state.whole = {};
  for (Thread& t : state.threads) {
    t.done = false;
    t.open.clear(), t.groups.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, entry, 0);
  }
  for (size_t left = state.threads.size(); left > 0;) {
    left = 0;
    for (Thread& t : state.threads) {
      if (t.done) continue;
      state.current = &t;
      swapcontext(&state.scheduler, &t.context);
      left += !t.done;
    }
  }
}

}  // namespace

void fail(const char* text) {
  std::fprintf(stderr, "emulation: %s\n", text);
  std::abort();
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  state.grid = grid, state.block = block, state.kernel = &kernel;
  const size_t count = size_t{block.x} * block.y * block.z;
  state.threads = std::vector<Thread>(count);
  for (size_t i = 0; i < count; ++i) {
    state.threads[i].number = static_cast<int>(i);
    state.threads[i].index = dim3(static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                                  static_cast<unsigned>(i / block.x / block.y));
  }
  state.shared.resize(shared_bytes + 16);
  const size_t off = reinterpret_cast<uintptr_t>(state.shared.data()) % 16;
  state.shared_start = state.shared.data() + (off ? 16 - off : 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        state.block_at = dim3(x, y, z);
        run_block();
      }
}

const dim3& thread_index() { return state.current->index; }
const dim3& block_index() { return state.block_at; }
const dim3& block_size() { return state.block; }
const dim3& grid_size() { return state.grid; }
int lane() { return state.current->number % 32; }
unsigned char* shared_memory() { return state.shared_start; }
unsigned char* warp_slot(int lane) {
  return state.slots.data() + (static_cast<size_t>(state.current->number / 32) * 32 + static_cast<size_t>(lane)) * kSlot;
}

void block_barrier() { arrive(state.whole, static_cast<int>(state.threads.size())); }
void warp_barrier() {
  const int warp = state.current->number / 32;
  arrive(state.warps[static_cast<size_t>(warp)], size_of_warp(warp));
}

void copy_later(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    fail("an asynchronous copy is not aligned to 16 bytes");
  state.current->open.push_back({to, from});
}
void commit_copies() { state.current->groups.push_back(std::move(state.current->open)), state.current->open.clear(); }
void wait_copies(int left) {
  auto& groups = state.current->groups;
  while (static_cast<int>(groups.size()) > left) {
    for (const Copy& copy : groups.front())
      if (copy.from != nullptr)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    groups.pop_front();
  }
}

}  // namespace emulation
