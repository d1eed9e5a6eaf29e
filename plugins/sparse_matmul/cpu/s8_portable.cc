// int8 kernels of AVX2 and NEON: how their work is cut into tasks.
#include "s8_portable.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "tiled_product.h"

namespace optimize::sparse_matmul {
namespace {

// One element: `codes_per_element` int8 weights, sign-extended to the codes' type.
using Element = std::array<int8_t, 4>;

uint32_t bits_of(const Element& weights, int64_t code_bytes) {
  uint32_t bits = 0;
  if (code_bytes == 1) {
    std::memcpy(&bits, weights.data(), sizeof bits);
  } else {
    const int16_t wide[2] = {weights[0], weights[1]};
    std::memcpy(&bits, wide, sizeof bits);
  }
  return bits;
}

template <int64_t kCodeBytes>
StripLists make_groups(const Weight& w, int64_t strip, TileShape shape) {
  constexpr int64_t kCodes = 4 / kCodeBytes;
  StripLists out;
  const int64_t tiles_k = w.tiles_k(), step = shape.block * kCodes / kTile;
  std::vector<Element> elements(static_cast<size_t>(kTile * shape.block));
  for (int64_t kt = 0; kt < tiles_k; kt += step) {
    std::fill(elements.begin(), elements.end(), Element{});
    for (int64_t t = kt; t < std::min(kt + step, tiles_k); ++t) {
      const int64_t tile = strip * tiles_k + t;
      const int8_t* value = static_cast<const int8_t*>(w.values) + w.offsets[tile];
      for (int64_t p = 0; p < kTile * kTile; ++p) {
        if (!(w.bitmap[tile * kBitmapBytes + p / 8] >> (p % 8) & 1)) continue;
        const int64_t k = (t - kt) * kTile + p / 256 * 4 + p % 4, n = p % 256 / 64 * 16 + p % 64 / 4;
        elements[static_cast<size_t>(n * shape.block + k / kCodes)][static_cast<size_t>(k % kCodes)] = *value++;
      }
    }
    const auto stored = [&](int64_t n, int64_t e) {
      return elements[static_cast<size_t>(n * shape.block + e)] != Element{};
    };
    std::array<int64_t, kTile> counts{}, order;
    for (int64_t n = 0; n < kTile; ++n)
      for (int64_t e = 0; e < shape.block; ++e) counts[static_cast<size_t>(n)] += stored(n, e);
    std::iota(order.begin(), order.end(), 0);  // by length: loops whose ends the processor predicts
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return counts[i] < counts[j]; });
    out.begin_block();
    out.codes.push_back(static_cast<uint16_t>(kTile - std::count(counts.begin(), counts.end(), 0)));
    for (const int64_t n : order) {
      if (counts[n] == 0) continue;
      out.codes.push_back(static_cast<uint16_t>(shape.offset(n)));
      out.codes.push_back(static_cast<uint16_t>(counts[n]));
      for (int64_t e = 0; e < shape.block; ++e) {
        if (!stored(n, e)) continue;
        out.codes.push_back(static_cast<uint16_t>(shape.offset(e)));
        out.values.push_back(bits_of(elements[static_cast<size_t>(n * shape.block + e)], kCodeBytes));
      }
    }
  }
  return out;
}

class Portable final : public Kernel {
 public:
  Portable(const Weight& weight, const S8Kernels& set)
      : w_(weight),
        set_(set),
        density_(density_of(weight)),
        row_bytes_(weight.tiles_k() * kTile * set.code_bytes),
        groups_(weight, set.groups, set.shape, row_bytes_ / 4, set.code_bytes == 1 ? make_groups<1> : make_groups<2>) {}

  void run(const float* x, int64_t M, float* y, const Parallel& parallel) const override {
    static thread_local Scratch code_memory, step_memory;
    uint8_t* codes = static_cast<uint8_t*>(code_memory.bytes(M * row_bytes_));
    float* steps = step_memory.floats(M);
    constexpr int64_t kTokens = 8;  // of one task that quantizes
    run_tasks(parallel, (M + kTokens - 1) / kTokens, [&](int64_t i) {
      for (int64_t m = i * kTokens; m < std::min(M, (i + 1) * kTokens); ++m)
        steps[m] = set_.quantize(x + m * w_.K, w_.K, w_.x_scale, codes + m * row_bytes_);
    });
    if (wants_groups(M))
      groups_.run(codes, steps, M, y, parallel);
    else
      run_expand(codes, steps, M, y, parallel);
  }

 private:
  bool wants_groups(int64_t M) const {
    return static_cast<double>(M) >= 2 + 16 * density_;  // measured with AVX2
  }

  void run_expand(const uint8_t* codes, const float* steps, int64_t M, float* y, const Parallel& parallel) const {
    const int64_t groups = (M + kS8Tokens - 1) / kS8Tokens;
    run_tasks(parallel, w_.tiles_n() * groups, [&](int64_t i) {
      const int64_t g = i % groups, first = M * g / groups, tokens = M * (g + 1) / groups - first;
      set_.expand(w_, i / groups, codes + first * row_bytes_, steps + first, tokens, y + first * w_.N);
    });
  }

  Weight w_;
  const S8Kernels& set_;
  double density_;
  int64_t row_bytes_;
  TiledProduct groups_;
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
