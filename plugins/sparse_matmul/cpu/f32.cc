// float32 kernels: the choice between them, and the scalar one.
#include <vector>

#include "epilogue.h"
#include "kernels.h"

namespace optimize::sparse_matmul {
namespace {

class Scalar final : public Kernel {
 public:
  explicit Scalar(const Weight& weight) : w_(weight) {}

  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const override {
    struct Call {
      const Weight& w;
      const float* x;
      int64_t M;
      float* y;
    } call{w_, x, M, y};
    parallel.run(parallel.state, static_cast<size_t>(w_.tiles_n()),
                 [](void* user, size_t strip) {
                   const Call& c = *static_cast<Call*>(user);
                   strip_of(c.w, static_cast<int64_t>(strip), c.x, c.M, c.y);
                 },
                 &call);
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

}  // namespace

std::unique_ptr<Kernel> make_f32(const Weight& weight, Isa) { return std::make_unique<Scalar>(weight); }

}  // namespace optimize::sparse_matmul
