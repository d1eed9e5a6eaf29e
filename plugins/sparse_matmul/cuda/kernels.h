// CUDA kernels of SparseMatMul: y = activation(x W + bias). Knows no framework.
//
// Stored form as in ../sparse_matmul.h (64 x 64 tiles in the same order, bitmap, values, offsets), with layouts of its
// own that give every lane what it needs in the order in which it needs it. They are packed by
// optimizer/custom_ops/cuda_layout.py and described in decode.cu (mma16, mma8) and sparse24.cu (sp16, sp8).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include <cuda_runtime_api.h>

namespace optimize::sparse_matmul::cuda {

// mma16   unstructured, 16-bit values in the order of the fragments of mma.m16n8k16
// mma8    unstructured, int8 values in the order of the fragments of mma.m16n8k32
// sp16    2:4 along K, 16-bit values and metadata of mma.sp.m16n8k32
// sp8     2:4 along K, int8 values and metadata of mma.sp.m16n8k64
enum class Layout : int32_t { mma16 = 16, mma8 = 17, sp16 = 18, sp8 = 19 };
// The layout of a name in models, or null.
inline const Layout* find_layout(const std::string& name) {
  struct Named {
    const char* name;
    Layout layout;
  };
  static constexpr Named kLayouts[] = {
      {"mma16", Layout::mma16}, {"mma8", Layout::mma8}, {"sp16", Layout::sp16}, {"sp8", Layout::sp8}};
  for (const Named& known : kLayouts)
    if (name == known.name) return &known.layout;
  return nullptr;
}
inline bool is_int8(Layout layout) { return layout == Layout::mma8 || layout == Layout::sp8; }

enum class Type : int32_t { f16 = 0, bf16 = 1 };  // of x, y, bias, and of the values of mma16 and sp16

// All pointers are device memory. `activation` as in ../sparse_matmul.h.
struct Weight {
  int64_t K, N;
  Layout layout;
  Type type;
  int32_t activation;
  const uint8_t* bitmap;       // [T, 512] bitmap, or metadata (sp16, sp8), 16-byte aligned
  const void* values;          // 16-byte aligned; tiles start at multiples of 16 bytes
  const int32_t* offsets;      // [T + 1], in values; sp16 and sp8 do not read it (each tile has 2048 values)
  const void* bias;            // [N] of `type`, or null
  const float* scale;          // [N], mma8 and sp8: W = values * scale[n]
  const float* x_scale;        // [1] static scale of x, mma8 and sp8; null = one scale per token, computed here
  int32_t most_values = 0;     // mma16 and mma8: most values of a tile, that is the largest offsets[t + 1] - offsets[t];
                               // 0 = not known. Knowing it makes room for more tiles in flight. Too small is an error
                               // that is not noticed: the results are wrong.
  uint32_t* arrivals = nullptr;  // [ceil(N / 64)] zeros, left as zeros by every run: with them, few tokens (M <= 16)
                                 // need one kernel less (some 2 us). No two runs that may be under way at the same time
                                 // may have the same. null = not used
};

// Everything that run() relies on, checked on copies of the arrays in the host's memory: `weight` has the pointers of
// these (those of bias and x_scale are not looked at; scale may be null here). Sizes, offsets that begin at 16 bytes,
// lie inside of the values and have room for the bits before them, no bit outside of K x N, `most_values` where it is
// given, sound metadata, finite positive scales. Empty if the weight is sound, else a sentence saying what was found
// and what was expected. run() itself checks none of it: call this once for every weight that comes from a file.
std::string validate(const Weight& weight, int64_t bitmap_bytes, int64_t num_values, int64_t num_offsets);

// Bytes of device scratch that run() needs for M tokens or fewer (split-K sums, codes of x), 256-byte aligned. The same
// on every machine, so that it may be asked where no GPU is, or another one.
size_t workspace_bytes(const Weight& weight, int64_t M);

// Enqueues y [M, N] = activation(x [M, K] W + bias) on `stream`; x and y row-major, dense, 16-byte aligned. Any
// M >= 0, any K and N (tails are handled inside). No allocation, no synchronization: may be captured in a graph.
// Deterministic: the same inputs give the same bits. Returns the error of the launch; cudaErrorInvalidValue for a
// layout that does not exist or an int8 layout without scale. Nothing in `workspace` has to be initialized.
//
// mma16 and mma8 decode the weight once for every 16 tokens: right for any M, but from some tens of tokens on slower
// than a dense product. Who chooses between the two (a cost model) must refuse them for large M. sp16 and sp8 have a
// kernel of their own for M > 16.
cudaError_t run(const Weight& weight, const void* x, int64_t M, void* y, void* workspace, cudaStream_t stream);

}  // namespace optimize::sparse_matmul::cuda
