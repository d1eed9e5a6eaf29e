// int8 kernels: the choice between them, and the scalar one.
#include <cmath>
#include <vector>

#include "epilogue.h"
#include "kernels.h"

namespace optimize::sparse_matmul {
namespace {

class Scalar final : public Kernel {
 public:
  explicit Scalar(const Weight& weight) : w_(weight) {}

  void run(const float* x, int64_t M, float* y, const Parallel&) const override {
    std::vector<int8_t> q(static_cast<size_t>(w_.K));
    for (int64_t m = 0; m < M; ++m) {
      const float step = quantize(x + m * w_.K, q.data());
      for (int64_t strip = 0; strip < w_.tiles_n(); ++strip) row(strip, q.data(), step, y + m * w_.N);
    }
  }

 private:
  // Codes of one token; returns the value of one step.
  float quantize(const float* x, int8_t* q) const {
    float step;
    if (w_.x_scale) {
      step = *w_.x_scale;
    } else {
      float top = 0;
      for (int64_t k = 0; k < w_.K; ++k) top = std::fmax(top, std::fabs(x[k]));
      step = std::fmax(top, 1e-12f) / 127.0f;
    }
    const float inverse = 1.0f / step;
    for (int64_t k = 0; k < w_.K; ++k)
      q[k] = static_cast<int8_t>(std::fmin(std::fmax(std::nearbyint(x[k] * inverse), -128.0f), 127.0f));
    return step;
  }

  void row(int64_t strip, const int8_t* q, float step, float* y) const {
    int32_t sum[kTile] = {};
    for (int64_t kt = 0; kt < w_.tiles_k(); ++kt) {
      const int64_t tile = strip * w_.tiles_k() + kt;
      const int8_t* value = static_cast<const int8_t*>(w_.values) + w_.offsets[tile];
      const uint8_t* bits = w_.bitmap + tile * kBitmapBytes;
      for (int64_t p = 0; p < kTile * kTile; ++p)
        if (bits[p / 8] >> (p % 8) & 1)
          sum[p % 256 / 64 * 16 + p % 64 / 4] += *value++ * q[kt * kTile + p / 256 * 4 + p % 4];
    }
    for (int64_t n = 0; n < kTile && strip * kTile + n < w_.N; ++n) {
      const int64_t column = strip * kTile + n;
      const float v = static_cast<float>(sum[n]) * step * w_.scale[column];
      y[column] = activate(w_.activation, v + (w_.bias ? w_.bias[column] : 0.0f));
    }
  }

  Weight w_;
};

}  // namespace

std::unique_ptr<Kernel> make_s8(const Weight& weight, Isa isa) {
  if (auto kernel = make_s8_dense(weight, isa)) return kernel;
  if (auto kernel = make_s8_portable(weight, isa)) return kernel;
  return std::make_unique<Scalar>(weight);
}

}  // namespace optimize::sparse_matmul
