// The choice between kernels, and what the workspace holds.
#include "decode.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int64_t kFewTokens = 16;  // up to which 2:4 weights are multiplied a share of K at a time

// Sums of shares of K, then (mma8) codes of x and the value of one step of each token.
struct Workspace {
  size_t parts = 0, codes = 0, steps = 0;  // bytes

  Workspace(const Weight& w, int64_t M) {
    const auto rounded = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
    int splits = 0;
    if (w.layout == Layout::sp16)
      splits = M <= kFewTokens ? decode_sp16_splits(w, M) : 0;
    else
      splits = decode_splits(w, M);
    parts = rounded(static_cast<size_t>(splits) * static_cast<size_t>(M * w.N) * sizeof(float));
    if (w.layout != Layout::mma8) return;
    codes = rounded(static_cast<size_t>(M * ((w.K + kTile - 1) / kTile * kTile)));
    steps = rounded(static_cast<size_t>(M) * sizeof(float));
  }
};

}  // namespace

size_t workspace_bytes(const Weight& w, int64_t M) {
  const Workspace space(w, M);
  return space.parts + space.codes + space.steps;
}

cudaError_t run(const Weight& w, const void* x, int64_t M, void* y, void* workspace, cudaStream_t stream) {
  if (M == 0) return cudaSuccess;
  switch (w.layout) {
    case Layout::mma16:
      return decode_mma16(w, x, M, y, workspace, stream);
    case Layout::mma8: {
      if (w.scale == nullptr) return cudaErrorInvalidValue;
      const Workspace space(w, M);
      char* const base = static_cast<char*>(workspace);
      int8_t* const codes = reinterpret_cast<int8_t*>(base + space.parts);
      float* const steps = reinterpret_cast<float*>(base + space.parts + space.codes);
      const cudaError_t error = quantize(w, x, M, codes, steps, stream);
      return error == cudaSuccess ? decode_mma8(w, codes, steps, M, y, workspace, stream) : error;
    }
    case Layout::sp16:
      return M <= kFewTokens ? decode_sp16(w, x, M, y, workspace, stream) : prefill_sp16(w, x, M, y, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace optimize::sparse_matmul::cuda
