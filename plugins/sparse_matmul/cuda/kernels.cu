// The choice between kernels.
#include "decode.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int64_t kFewTokens = 16;  // up to which 2:4 weights are multiplied a share of K at a time

int splits(const Weight& w, int64_t M) {
  if (w.layout == Layout::mma16) return decode_mma16_splits(w, M);
  return w.layout == Layout::sp16 && M <= kFewTokens ? decode_sp16_splits(w, M) : 0;
}

}  // namespace

size_t workspace_bytes(const Weight& w, int64_t M) {
  const size_t bytes = static_cast<size_t>(splits(w, M)) * static_cast<size_t>(M * w.N) * sizeof(float);
  return (bytes + 255) / 256 * 256;
}

cudaError_t run(const Weight& w, const void* x, int64_t M, void* y, void* workspace, cudaStream_t stream) {
  if (M == 0) return cudaSuccess;
  float* parts = static_cast<float*>(workspace);
  switch (w.layout) {
    case Layout::mma16:
      return decode_mma16(w, x, M, y, parts, stream);
    case Layout::sp16:
      return M <= kFewTokens ? decode_sp16(w, x, M, y, parts, stream) : prefill_sp16(w, x, M, y, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace optimize::sparse_matmul::cuda
