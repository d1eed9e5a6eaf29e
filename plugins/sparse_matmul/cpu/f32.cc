// float32 kernels: the choice between them, how their work is cut into tasks, and the scalar one.
//
// Results do not depend on the number of threads: a task computes whole outputs, each in one order.
// Not-a-number and infinite values of x reach every output with a stored weight at their k, as in a dense
// product; other outputs may or may not become NaN (a dense product multiplies such x by 0, which gives NaN).
#include <algorithm>
#include <mutex>
#include <vector>

#include "epilogue.h"
#include "f32_forms.h"
#include "kernels.h"
#include "parallel.h"

namespace optimize::sparse_matmul {
namespace {

class Scalar final : public Kernel {
 public:
  explicit Scalar(const Weight& weight) : w_(weight) {}

  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const override {
    run_tasks(parallel, w_.tiles_n(), [&](int64_t strip) { strip_of(w_, strip, x, M, y); });
  }

 private:
  static void strip_of(const Weight& w, int64_t strip, const float* x, int64_t M, float* y) {
    const int64_t columns = w.N - strip * kTile < kTile ? w.N - strip * kTile : kTile;
    for (int64_t m = 0; m < M; ++m) {
      float sum[kTile] = {};
      for (int64_t kt = 0; kt < w.tiles_k(); ++kt) {
        const int64_t tile = strip * w.tiles_k() + kt;
        const float* value = static_cast<const float*>(w.values) + w.offsets[tile];
        const uint8_t* bits = w.bitmap + tile * kBitmapBytes;
        for (int64_t k = 0; k < kTile; ++k)
          for (int64_t n = 0; n < kTile; ++n)
            if (bits[k * 8 + n / 8] >> (n % 8) & 1) sum[n] += x[m * w.K + kt * kTile + k] * *value++;
      }
      for (int64_t n = 0; n < columns; ++n) {
        const int64_t column = strip * kTile + n;
        y[m * w.N + column] = activate(w.activation, sum[n] + (w.bias ? w.bias[column] : 0.0f));
      }
    }
  }

  Weight w_;
};

enum class Form { expand, pairs, slices };

class Vectorized final : public Kernel {
 public:
  Vectorized(const Weight& weight, const F32Kernels& set)
      : w_(weight),
        set_(set),
        density_(density_of(weight)),
        pairs_(weight, set.pairs, set.shape(density_), weight.K, make_pairs) {}

  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const override {
    if (M <= 0) return;
    switch (choose(M)) {
      case Form::expand:
        return run_expand(x, M, y, parallel);
      case Form::slices:
        return run_slices(x, y, parallel);
      case Form::pairs:
        return pairs_.run(x, nullptr, M, y, parallel);
    }
  }

 private:
  Form choose(int64_t M) const {
    // Slices read 6 bytes for a weight and the bitmap 4 and an eighth for each place, but expanding it costs the
    // same whatever the density: measured from 0.05 to 0.3, they meet at 0.15 to 0.2.
    if (M == 1 && density_ <= 0.15 && set_.slices && w_.K <= 65536) return Form::slices;
    return static_cast<double>(M) < set_.pairs_from + set_.pairs_per_density * density_ ? Form::expand : Form::pairs;
  }

  void run_expand(const float* x, int64_t M, float* y, const Parallel& parallel) const {
    const int64_t strips = w_.tiles_n(), groups = (M + kExpandTokens - 1) / kExpandTokens;
    run_tasks(parallel, strips * groups, [&](int64_t i) {
      const int64_t g = i % groups, first = M * g / groups, tokens = M * (g + 1) / groups - first;
      set_.expand(w_, i / groups, x + first * w_.K, tokens, y + first * w_.N);
    });
  }

  void run_slices(const float* x, float* y, const Parallel& parallel) const {
    std::call_once(slices_once_, [&] { slices_ = make_slices(w_, set_.lanes); });
    const Slices s{set_.lanes, slices_.steps.data(), slices_.columns.data(), slices_.rows.data(),
                   slices_.values.data()};
    run_tasks(parallel, w_.tiles_n(), [&](int64_t strip) { set_.slices(w_, s, strip, x, y); });
  }

  Weight w_;
  const F32Kernels& set_;
  double density_;
  TiledProduct pairs_;
  mutable std::once_flag slices_once_;
  mutable OwnedSlices slices_;
};

}  // namespace

std::unique_ptr<Kernel> make_f32(const Weight& weight, Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::amx:
    case Isa::avx512:
      return std::make_unique<Vectorized>(weight, *f32_avx512());
    case Isa::avx2:
      return std::make_unique<Vectorized>(weight, *f32_avx2());
#endif
#if defined(__aarch64__)
    case Isa::neon:
      return std::make_unique<Vectorized>(weight, *f32_neon());
#endif
    default:
      return std::make_unique<Scalar>(weight);
  }
}

}  // namespace optimize::sparse_matmul
