// Compares every instruction set of this machine with float64 (float32 weights) and with the scalar kernel (int8
// weights), over shapes with tails, densities, activations and numbers of threads. Exit status 0 if all agree.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

extern "C" {
int32_t optimize_has_isa(int32_t isa);
void* optimize_sparse_matmul_create(int64_t K, int64_t N, int32_t layout, int32_t activation, int32_t isa,
                                    const uint8_t* bitmap, int64_t bitmap_bytes, const void* values, int64_t num_values,
                                    const int32_t* offsets, int64_t num_offsets, const float* bias, const float* scale,
                                    const float* x_scale, char* error, int64_t error_size);
int32_t optimize_sparse_matmul_run(void* kernel, const float* x, int64_t M, float* y, int64_t threads);
void optimize_sparse_matmul_destroy(void* kernel);
}

namespace {

constexpr const char* kIsas[] = {"scalar", "neon", "avx2", "avx512", "amx"};

// A weight in both layouts with the same places; float32 values are the int8 values times 1/16.
struct Stored {
  int64_t K, N;
  std::vector<double> dense;  // [K, N]
  std::vector<uint8_t> bitmap[2];
  std::vector<int32_t> offsets[2];
  std::vector<float> floats;
  std::vector<int8_t> bytes;
  std::vector<float> bias, scale;

  Stored(int64_t rows, int64_t columns, double density, std::mt19937& random) : K(rows), N(columns) {
    std::uniform_real_distribution<double> uniform(0, 1);
    dense.resize(static_cast<size_t>(K * N));
    for (double& w : dense)
      if (uniform(random) < density) w = std::floor(uniform(random) * 127 + 1) / 16 * (uniform(random) < 0.5 ? -1 : 1);
    for (int64_t n = 0; n < N; ++n) {
      bias.push_back(static_cast<float>(uniform(random) - 0.5));
      scale.push_back(static_cast<float>(uniform(random) + 0.5) / 256);
    }
    for (int layout = 0; layout < 2; ++layout) pack(layout);
  }

  void pack(int layout) {
    offsets[layout].push_back(0);
    for (int64_t tn = 0; tn < N; tn += 64)
      for (int64_t tk = 0; tk < K; tk += 64) {
        for (int64_t byte = 0; byte < 512; ++byte) {
          uint8_t bits = 0;
          for (int64_t bit = 0; bit < 8; ++bit) {
            const int64_t p = 8 * byte + bit;
            const int64_t k = tk + (layout ? p / 256 * 4 + p % 4 : p / 64);
            const int64_t n = tn + (layout ? p % 256 / 64 * 16 + p % 64 / 4 : p % 64);
            const double w = k < K && n < N ? dense[static_cast<size_t>(k * N + n)] : 0;
            if (w == 0) continue;
            bits = static_cast<uint8_t>(bits | 1 << bit);
            if (layout)
              bytes.push_back(static_cast<int8_t>(w * 16));
            else
              floats.push_back(static_cast<float>(w));
          }
          bitmap[layout].push_back(bits);
        }
        offsets[layout].push_back(static_cast<int32_t>(layout ? bytes.size() : floats.size()));
      }
  }

  std::vector<float> run(int layout, int isa, int activation, const std::vector<float>& x, int64_t M,
                         int64_t threads) const {
    char error[300];
    const void* values = layout ? static_cast<const void*>(bytes.data()) : floats.data();
    void* kernel = optimize_sparse_matmul_create(
        K, N, layout, activation, isa, bitmap[layout].data(), static_cast<int64_t>(bitmap[layout].size()), values,
        static_cast<int64_t>(layout ? bytes.size() : floats.size()), offsets[layout].data(),
        static_cast<int64_t>(offsets[layout].size()), bias.data(), layout ? scale.data() : nullptr, nullptr, error,
        sizeof error);
    std::vector<float> y(static_cast<size_t>(M * N), std::nanf(""));
    if (kernel == nullptr || optimize_sparse_matmul_run(kernel, x.data(), M, y.data(), threads)) {
      std::printf("refused: %s\n", error);
      return {};
    }
    optimize_sparse_matmul_destroy(kernel);
    return y;
  }

  // The product before the activation, and the sum of absolute terms.
  void product(const std::vector<float>& x, int64_t m, int64_t n, double& sum, double& size) const {
    sum = bias[static_cast<size_t>(n)], size = std::fabs(sum);
    for (int64_t k = 0; k < K; ++k) {
      const double term = x[static_cast<size_t>(m * K + k)] * dense[static_cast<size_t>(k * N + n)];
      sum += term, size += std::fabs(term);
    }
  }
};

double activate(int kind, double v) {
  switch (kind) {
    case 1:
      return v > 0 ? v : 0;
    case 2:
      return v * 0.5 * std::erfc(-v * std::sqrt(0.5));
    case 3:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (v + 0.044715 * v * v * v)));
    case 4:
      return v / (1 + std::exp(-v));
    default:
      return v;
  }
}

// Errors of sums of K products, and of activations of slope at most 1.13; the scalar forms of activations cancel.
bool close(double y, double wanted, double size, int64_t K) {
  return std::fabs(y - wanted) <= (2 * std::sqrt(static_cast<double>(K)) + 16) * 0x1p-24 * (size + 1);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  long checked = 0, wrong = 0, cases = 0;
  const int64_t shapes[][2] = {{1, 1}, {3, 70}, {64, 64}, {65, 63}, {130, 200}, {300, 129}};
  for (const auto& shape : shapes)
    for (const double density : {0.0, 0.02, 0.1, 0.5, 1.0}) {
      const Stored w(shape[0], shape[1], density, random);
      for (const int64_t M : {0, 1, 2, 5, 15, 16, 17, 33, 65, 197}) {
        std::vector<float> x(static_cast<size_t>(M * w.K));
        for (float& v : x) v = normal(random);
        const int activation = static_cast<int>(cases++ % 5);
        const std::vector<float> scalar = w.run(1, 0, activation, x, M, 1);
        for (int isa = 0; isa < 5; ++isa) {
          if (!optimize_has_isa(isa)) continue;
          const std::vector<float> y = w.run(0, isa, activation, x, M, 1 + M % 3);
          const std::vector<float> z = w.run(1, isa, activation, x, M, 1 + M % 3);
          for (int64_t i = 0; i < M * w.N; ++i) {
            double sum, size;
            w.product(x, i / w.N, i % w.N, sum, size);
            const size_t at = static_cast<size_t>(i);
            const bool same = close(y[at], activate(activation, sum), size, w.K),
                       exact = close(z[at], scalar[at], std::fabs(scalar[at]), 1);
            checked += 2;
            if (same && exact) continue;
            if (++wrong < 10)
              std::printf(
                  "%s: K %ld N %ld density %g M %ld activation %d output %ld: float32 %g of %g, int8 %g of %g\n",
                  kIsas[isa], static_cast<long>(w.K), static_cast<long>(w.N), density, static_cast<long>(M), activation,
                  static_cast<long>(i), static_cast<double>(y[at]), activate(activation, sum),
                  static_cast<double>(z[at]), static_cast<double>(scalar[at]));
          }
        }
      }
    }
  for (int isa = 0; isa < 5; ++isa)
    if (optimize_has_isa(isa)) std::printf("%s ", kIsas[isa]);
  std::printf("- %ld outputs compared, %ld wrong\n", checked, wrong);
  return wrong ? 1 : 0;
}
