// SparseMatMul: y = activation(x W + bias), W [K, N] constant and stored as a bitmap and its non-zero values.
//
// This header knows no framework. What the operator computes is declared once, with its body in
// standard ONNX operators, in optimizer/custom_ops/declaration.py; the hash of that declaration is in
// declaration.h and travels in every node.
//
// Stored form: W is cut into tiles of 64 x 64 (k x n), padded with zeros; tile t = (n / 64) * ceil(K / 64) + k / 64.
//   bitmap   [T, 512] bytes; bit b of byte i is position p = 8 i + b of the tile, set where the weight is stored
//   offsets  [T + 1]; the values of tile t are values[offsets[t] ..], one for each set bit, in order of position
//   values   [V]; the gap between two tiles may be padded
// The layout says which (k, n) of the tile a position is:
//   n64k1    p = k * 64 + n                                          (float32, CPU)
//   n16k4    p = (k / 4) * 256 + (n / 16) * 64 + (n % 16) * 4 + k % 4  (int8, CPU)
// The layouts of CUDA are described in cuda/decode.cu and cuda/sparse24.cu.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace optimize::sparse_matmul {

constexpr int64_t kTile = 64;                         // rows and columns of a tile
constexpr int64_t kBitmapBytes = kTile * kTile / 8;   // of one tile

enum class Layout : int32_t { n64k1 = 0, n16k4 = 1 };

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };
// Their names in models, by number.
inline constexpr const char* kActivationNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
// The number of a name, or -1.
inline int32_t activation_number(const std::string& name) {
  int32_t number = 0;
  for (const char* known : kActivationNames) {
    if (name == known) return number;
    ++number;
  }
  return -1;
}

// A stored weight and what is applied after the product. Nothing is owned; all pointers live as long as
// the kernel made from it, and need the alignment of their type only (bitmap: none).
struct Weight {
  int64_t K = 0, N = 0;
  Layout layout = Layout::n64k1;
  Activation activation = Activation::none;
  const uint8_t* bitmap = nullptr;    // [T, 512]
  const int32_t* offsets = nullptr;   // [T + 1]
  const void* values = nullptr;       // float [V] (n64k1) or int8 [V] (n16k4)
  int64_t num_values = 0;             // V
  const float* bias = nullptr;        // [N] or null
  const float* scale = nullptr;       // [N], int8 only: W = values * scale[n]
  const float* x_scale = nullptr;     // [1], int8 only: x is quantized with this scale; null = one per token

  int64_t tiles_k() const { return (K + kTile - 1) / kTile; }
  int64_t tiles_n() const { return (N + kTile - 1) / kTile; }
  int64_t tiles() const { return tiles_k() * tiles_n(); }
};

// Everything a kernel relies on: sizes, offsets inside of the values and equal to the bits before them, no
// bit set outside of K x N, finite positive scales. Empty if the weight is sound, else a sentence saying what
// was found and what was expected. `bitmap_bytes` and `num_offsets` are the sizes of those arrays.
std::string validate(const Weight& weight, int64_t bitmap_bytes, int64_t num_offsets);

// How a kernel spreads work over threads: run(state, count, body, user) calls body(user, i) once for every
// i < count, in any order, and returns when all are done.
struct Parallel {
  void* state;
  void (*run)(void* state, size_t count, void (*body)(void* user, size_t index), void* user);
};

// One weight, ready to run. Thread-safe: several calls of run may be in flight.
class Kernel {
 public:
  virtual ~Kernel() = default;
  // x [M, K] and y [M, N], row-major and dense, any M >= 0. Throws std::bad_alloc only.
  virtual void run(const float* x, int64_t M, float* y, const Parallel& parallel) const = 0;
};

}  // namespace optimize::sparse_matmul
