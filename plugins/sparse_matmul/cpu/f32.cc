// float32 kernels: the choice between them, how their work is cut into tasks, and the scalar one.
//
// Results do not depend on the number of threads: a task computes whole outputs, each in one order.
// Not-a-number and infinite values of x reach every output with a stored weight at their k, as in a dense
// product; other outputs may or may not become NaN (a dense product multiplies such x by 0, which gives NaN).
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "epilogue.h"
#include "f32_forms.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

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
  Vectorized(const Weight& weight, const F32Kernels& set) : w_(weight), set_(set) {
    int64_t bits = 0;
    for (int64_t i = 0; i < w_.tiles() * kBitmapBytes; ++i) bits += __builtin_popcount(w_.bitmap[i]);
    density_ = static_cast<double>(bits) / (static_cast<double>(w_.K) * static_cast<double>(w_.N));
    shape_ = set_.shape(density_);
#ifdef OPTIMIZE_TUNING
    if (const char* f = std::getenv("SHAPE")) shape_ = {std::atoi(f) * set_.lanes, std::atoi(f + 2)};
#endif
  }

  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const override {
    if (M <= 0) return;
    switch (choose(M)) {
      case Form::expand:
        return run_expand(x, M, y, parallel);
      case Form::slices:
        return run_slices(x, y, parallel);
      case Form::pairs:
        return run_pairs(x, M, y, parallel);
    }
  }

 private:
  Form choose(int64_t M) const {
#ifdef OPTIMIZE_TUNING
    if (const char* f = std::getenv("FORM")) return static_cast<Form>(std::atoi(f));
#endif
    if (M == 1) return set_.slices && density_ <= 0.15 && w_.K <= 65536 ? Form::slices : Form::expand;
    return M >= 16 ? Form::pairs : Form::expand;
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
    const Slices s{set_.lanes, slices_.steps.data(), slices_.columns.data(), slices_.rows.data(), slices_.values.data()};
    run_tasks(parallel, (w_.N + kWindow - 1) / kWindow, [&](int64_t i) { set_.slices(w_, s, i, x, y); });
  }

  // X is transposed for a chunk of tokens, then each task makes the outputs of one tile of tokens and some strips.
  void run_pairs(const float* x, int64_t M, float* y, const Parallel& parallel) const {
    make_all_pairs(parallel);
    constexpr int64_t kChunkFloats = int64_t{1} << 20;
    const int64_t most = std::max<int64_t>(1, kChunkFloats / (w_.K * shape_.stride)) * shape_.stride;
    const int64_t chunks = (M + most - 1) / most;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t first = std::min(M, c * most), tokens = std::min(M, first + most) - first;
      run_chunk(x + first * w_.K, tokens, y + first * w_.N, parallel);
    }
  }

  // Tiles of equal numbers of vectors, so that no last tile is nearly empty.
  struct TokenTile {
    int64_t first, tokens, vectors;
  };
  TokenTile tile_of(int64_t tokens, int64_t tiles, int64_t i) const {
    const int64_t vectors = (tokens + set_.lanes - 1) / set_.lanes;
    const int64_t begin = vectors * i / tiles, end = vectors * (i + 1) / tiles;
    return {begin * set_.lanes, std::min(tokens, end * set_.lanes) - begin * set_.lanes, end - begin};
  }

  void run_chunk(const float* x, int64_t tokens, float* y, const Parallel& parallel) const {
    const int64_t tiles = (tokens + shape_.stride - 1) / shape_.stride, tile_floats = w_.K * shape_.stride;
    static thread_local Scratch scratch;
    float* xt = scratch.floats(tiles * tile_floats);

    constexpr int64_t kRows = 256;
    const int64_t parts = (w_.K + kRows - 1) / kRows;
    run_tasks(parallel, tiles * parts, [&](int64_t i) {
      const TokenTile t = tile_of(tokens, tiles, i / parts);
      const int64_t begin = i % parts * kRows, end = std::min(w_.K, begin + kRows);
      set_.transpose_x(x + t.first * w_.K, w_.K, begin, end, t.tokens, shape_.stride, xt + i / parts * tile_floats);
    });
    const int64_t strips = w_.tiles_n(), tasks_per_tile = (strips + strips_per_task_ - 1) / strips_per_task_;
    run_tasks(parallel, tiles * tasks_per_tile, [&](int64_t i) {
      const TokenTile t = tile_of(tokens, tiles, i / tasks_per_tile);
      const int64_t begin = i % tasks_per_tile * strips_per_task_;
      strips_of(begin, std::min(strips, begin + strips_per_task_), xt + i / tasks_per_tile * tile_floats, t,
                y + t.first * w_.N);
    });
  }

  void strips_of(int64_t begin, int64_t end, const float* xt, const TokenTile& t, float* y) const {
    static thread_local Scratch scratch;
    const int64_t blocks = (w_.K + shape_.block - 1) / shape_.block, strip_floats = kTile * shape_.stride;
    float* sums = scratch.floats((end - begin) * strip_floats);
    std::fill_n(sums, (end - begin) * strip_floats, 0.0f);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t strip = begin; strip < end; ++strip) {
        const StripPairs& p = pairs_[static_cast<size_t>(strip)];
        set_.pairs(p.codes.data() + p.code_begin[static_cast<size_t>(b)],
                   p.values.data() + p.value_begin[static_cast<size_t>(b)], xt + b * shape_.block * shape_.stride, t.vectors,
                   sums + (strip - begin) * strip_floats);
      }
    for (int64_t strip = begin; strip < end; ++strip)
      set_.finish_pairs(w_, strip, sums + (strip - begin) * strip_floats, t.tokens, shape_.stride, y);
  }

  void make_all_pairs(const Parallel& parallel) const {
    std::call_once(pairs_once_, [&] {
      std::vector<StripPairs> made(static_cast<size_t>(w_.tiles_n()));
      run_tasks(parallel, w_.tiles_n(),
                [&](int64_t strip) { made[static_cast<size_t>(strip)] = make_pairs(w_, strip, shape_); });
      pairs_ = std::move(made);
    });
  }

  Weight w_;
  const F32Kernels& set_;
  double density_;
  PairShape shape_;
  int64_t strips_per_task_ = std::getenv("SPT") ? std::atoi(std::getenv("SPT")) : 1;
  mutable std::once_flag pairs_once_, slices_once_;
  mutable std::vector<StripPairs> pairs_;
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
