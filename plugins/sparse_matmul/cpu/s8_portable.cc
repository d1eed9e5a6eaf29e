// int8 kernels of AVX2 and NEON: how their work is cut into tasks.
#include "s8_portable.h"

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace optimize::sparse_matmul {
namespace {

class Portable final : public Kernel {
 public:
  Portable(const Weight& weight, const S8Kernels& set) : w_(weight), set_(set) {}

  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const override {
    static thread_local Scratch code_memory, step_memory;
    const int64_t row = w_.tiles_k() * kTile * set_.code_bytes;
    uint8_t* codes = static_cast<uint8_t*>(code_memory.bytes(M * row));
    float* steps = step_memory.floats(M);
    constexpr int64_t kTokens = 8;  // of one task that quantizes
    run_tasks(parallel, (M + kTokens - 1) / kTokens, [&](int64_t i) {
      for (int64_t m = i * kTokens; m < M && m < (i + 1) * kTokens; ++m)
        steps[m] = set_.quantize(x + m * w_.K, w_.K, w_.x_scale, codes + m * row);
    });
    const int64_t groups = (M + kS8Tokens - 1) / kS8Tokens;
    run_tasks(parallel, w_.tiles_n() * groups, [&](int64_t i) {
      const int64_t g = i % groups, first = M * g / groups, tokens = M * (g + 1) / groups - first;
      set_.expand(w_, i / groups, codes + first * row, steps + first, tokens, y + first * w_.N);
    });
  }

 private:
  Weight w_;
  const S8Kernels& set_;
};

}  // namespace

std::unique_ptr<Kernel> make_s8_portable(const Weight& weight, Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return std::make_unique<Portable>(weight, *s8_avx2());
#elif defined(__aarch64__)
  if (isa == Isa::neon) return std::make_unique<Portable>(weight, *s8_neon());
#endif
  (void)isa;
  return nullptr;
}

}  // namespace optimize::sparse_matmul
