// What tests and benchmarks call through ctypes: kernels without any framework.
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "declaration.h"

using namespace optimize::sparse_matmul;

#define OPTIMIZE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Threads {
  int64_t count;
};

void run_on(void* state, size_t count, void (*body)(void*, size_t), void* user) {
  const size_t threads = static_cast<size_t>(static_cast<Threads*>(state)->count);
  if (threads <= 1) {
    for (size_t i = 0; i < count; ++i) body(user, i);
    return;
  }
  std::vector<std::thread> pool;
  for (size_t t = 0; t < threads; ++t)
    pool.emplace_back([=] {
      for (size_t i = t; i < count; i += threads) body(user, i);
    });
  for (auto& thread : pool) thread.join();
}

}  // namespace

// Hash of the declaration that this library was built from.
OPTIMIZE_EXPORT int64_t optimize_sparse_matmul_declaration() { return OPTIMIZE_SPARSE_MATMUL_DECLARATION; }

// Whether the machine has the instruction set of that number (kernels.h), and the one that would be used.
OPTIMIZE_EXPORT int32_t optimize_has_isa(int32_t isa) { return has_isa(static_cast<Isa>(isa)); }
OPTIMIZE_EXPORT int32_t optimize_best_isa() { return static_cast<int32_t>(best_isa()); }

// A kernel, or null with the reason in `error` [error_size]. bias, scale and x_scale may be null.
OPTIMIZE_EXPORT void* optimize_sparse_matmul_create(int64_t K, int64_t N, int32_t layout, int32_t activation,
                                                    int32_t isa, const uint8_t* bitmap, int64_t bitmap_bytes,
                                                    const void* values, int64_t num_values, const int32_t* offsets,
                                                    int64_t num_offsets, const float* bias, const float* scale,
                                                    const float* x_scale, char* error, int64_t error_size) {
  const auto fail = [&](const std::string& text) {
    std::strncpy(error, text.c_str(), static_cast<size_t>(error_size - 1));
    error[error_size - 1] = 0;
    return static_cast<void*>(nullptr);
  };
  if (!has_isa(static_cast<Isa>(isa))) return fail("this machine lacks the instruction set");
  Weight w;
  w.K = K, w.N = N, w.layout = static_cast<Layout>(layout), w.activation = static_cast<Activation>(activation);
  w.bitmap = bitmap, w.values = values, w.num_values = num_values, w.offsets = offsets;
  w.bias = bias, w.scale = scale, w.x_scale = x_scale;
  if (const std::string reason = validate(w, bitmap_bytes, num_offsets); !reason.empty()) return fail(reason);
  try {
    return make_kernel(w, static_cast<Isa>(isa)).release();
  } catch (const std::exception& e) {
    return fail(e.what());
  }
}

// x [M, K], y [M, N]. `threads` of its own; 1 runs in the caller's thread.
OPTIMIZE_EXPORT int32_t optimize_sparse_matmul_run(void* kernel, const float* x, int64_t M, float* y, int64_t threads) {
  Threads state{threads};
  try {
    static_cast<Kernel*>(kernel)->run(x, M, y, Parallel{&state, run_on});
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

OPTIMIZE_EXPORT void optimize_sparse_matmul_destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }
