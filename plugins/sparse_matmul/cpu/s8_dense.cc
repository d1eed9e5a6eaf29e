// int8 kernels of AVX-512 and AMX: how their work is cut into tasks.
#include "s8_dense.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "s8_windows.h"
#include "scratch.h"
#include "tiled_product.h"

namespace optimize::sparse_matmul {
namespace {

class Dense final : public Kernel {
 public:
  // Windows are used for up to `window_weights` stored weights of a row of W, times tokens.
  Dense(const Weight& weight, const S8Dense& set, double window_weights)
      : w_(weight),
        set_(set),
        density_(density_of(weight)),
        window_weights_(window_weights),
        sums_(static_cast<size_t>(weight.tiles_n() * kTile)),
        windows_(weight, set, sums_.data()) {
    for (int64_t strip = 0; strip < w_.tiles_n(); ++strip) set_.column_sums(w_, strip, &sums_[strip * kTile]);
    const int64_t padded = w_.tiles_k() * kTile;
    // Rows an odd number of cache lines apart do not compete for the same places of the cache.
    stride_ = padded / 64 % 2 ? padded : padded + 64;
  }

  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const override {
    if (M == 0) return;
    if (wants_windows(M)) return windows_.run(x, M, y, parallel);
    // In chunks of tokens whose codes stay in the second cache while every strip is multiplied with them.
    constexpr int64_t kChunkBytes = int64_t{1} << 19, kLeast = 128;
    const int64_t most = std::max(kLeast, kChunkBytes / stride_), chunks = (M + most - 1) / most;
    const int64_t step = ((M + chunks - 1) / chunks + 31) / 32 * 32;
    for (int64_t first = 0; first < M; first += step)
      run_chunk(x + first * w_.K, std::min(step, M - first), y + first * w_.N, parallel);
  }

 private:
  void run_chunk(const float* x, int64_t M, float* y, const Parallel& parallel) const {
    static thread_local Scratch code_memory, step_memory;
    const int64_t rows = (M + 15) / 16 * 16;
    int8_t* codes = static_cast<int8_t*>(code_memory.bytes(rows * stride_));
    float* steps = step_memory.floats(M);
    quantize(x, M, codes, steps, parallel);
    const Codes all{codes, stride_, steps};
    if (M <= kSmallTokens)
      run_small(all, M, y, parallel);
    else
      run_large(all, M, y, parallel);
  }

  // Measured, from 40 to 95 % zeros. One token never makes the lists: they take more memory than the stored form.
  bool wants_windows(int64_t M) const {
    if (density_ > 0.6 || M < (density_ > 0.15 ? 6 : 2)) return false;
    return static_cast<double>(M) * density_ <= window_weights_;
  }

  void quantize(const float* x, int64_t M, int8_t* codes, float* steps, const Parallel& parallel) const {
    constexpr int64_t kElements = 16384;  // of one task: some microseconds
    const int64_t tokens = std::max<int64_t>(1, kElements / w_.K);
    run_tasks(parallel, (M + tokens - 1) / tokens, [&](int64_t i) {
      for (int64_t m = i * tokens; m < std::min(M, (i + 1) * tokens); ++m)
        steps[m] = set_.quantize(x + m * w_.K, w_.K, w_.x_scale, codes + m * stride_);
    });
    const int64_t rows = (M + 15) / 16 * 16;
    if (M > kSmallTokens) std::memset(codes + M * stride_, 0, static_cast<size_t>((rows - M) * stride_));
  }

  // The strips of one task.
  template <typename Body>
  void run_strips(int64_t most, const Parallel& parallel, const Body& body) const {
    const int64_t strips = w_.tiles_n(), tasks = std::min(strips, most);
    run_tasks(parallel, tasks, [&](int64_t i) {
      for (int64_t s = strips * i / tasks; s < strips * (i + 1) / tasks; ++s) body(s);
    });
  }

  void run_small(Codes codes, int64_t M, float* y, const Parallel& parallel) const {
    constexpr int64_t kWeights = 32768;  // of one task: a microsecond
    run_strips(std::max<int64_t>(1, std::min<int64_t>(64, w_.K * w_.N / kWeights)), parallel,
               [&](int64_t s) { set_.small(w_, s, &sums_[s * kTile], codes, M, y); });
  }

  void run_large(Codes codes, int64_t M, float* y, const Parallel& parallel) const {
    // Where there are few strips, tokens are shared out too; each task then expands its strip for itself.
    constexpr int64_t kTasks = 16, kTokens = 256;
    const int64_t parts = w_.tiles_n() >= kTasks ? 1 : std::min((kTasks - 1) / w_.tiles_n() + 1, M / kTokens);
    const int64_t pieces = std::max<int64_t>(1, parts);
    const int64_t step = ((M + pieces - 1) / pieces + 31) / 32 * 32;
    run_tasks(parallel, w_.tiles_n() * pieces, [&](int64_t i) {
      const int64_t s = i / pieces, first = i % pieces * step, tokens = std::min(M - first, step);
      if (tokens <= 0) return;
      static thread_local Scratch memory;
      const int64_t bytes = w_.tiles_k() * kTile * kTile;
      int8_t* dense = static_cast<int8_t*>(memory.bytes(bytes + (tokens + 15) / 16 * 16 * 32 * 4));
      set_.expand(w_, s, dense);
      const Codes part{codes.data + first * codes.stride, codes.stride, codes.steps + first};
      set_.large(w_, s, dense, &sums_[s * kTile], part, tokens,
                 reinterpret_cast<int32_t*>(dense + bytes), y + first * w_.N);
    });
  }

  Weight w_;
  const S8Dense& set_;
  double density_, window_weights_;
  int64_t stride_;
  std::vector<int32_t> sums_;
  Windows windows_;
};

}  // namespace

std::unique_ptr<Kernel> make_s8_dense(const Weight& weight, Isa isa) {
#if defined(__x86_64__)
  // AMX multiplies zeros so fast that leaving them out pays for few tokens only.
  constexpr double kAlways = std::numeric_limits<double>::infinity(), kAmx = 6;
  if (isa == Isa::avx512) return std::make_unique<Dense>(weight, *s8_avx512(), kAlways);
  if (isa == Isa::amx) return std::make_unique<Dense>(weight, *s8_amx(), kAmx);
#endif
  (void)weight, (void)isa;
  return nullptr;
}

}  // namespace optimize::sparse_matmul
