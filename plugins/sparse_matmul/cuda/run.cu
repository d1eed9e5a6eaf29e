// The entry: scratch, slabs of tokens, the choice of the kernel, and the sum of the splits.
#include "common.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostProcessors = 256;  // that plans make use of; more than any GPU has

template <typename Sum>
__global__ void __launch_bounds__(kThreads) sum_of_parts(Weight w, Call call, int splits) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x, count = call.M * w.N;
  if (i >= count) return;
  const Sum* parts = static_cast<const Sum*>(call.parts);
  Sum sum = 0;
  for (int s = 0; s < splits; ++s) sum += parts[s * count + i];
  store(w, call, i / w.N, i % w.N, sum);
}

Machine machine() {
  Machine m{1, 48 * 1024, 64 * 1024};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return m;
  cudaDeviceGetAttribute(&m.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&m.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&m.shared_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (m.processors > kMostProcessors) m.processors = kMostProcessors;
  return m;
}

// The most splits that any device's plan has. Scratch is reserved for these, because it may be reserved where the product
// does not run: an engine is built on one machine, perhaps without a GPU, and used on another.
int64_t most_splits(const Weight& w, int64_t M) {
  if (is_sparse24(w) && M > kFewTokens) return plan_sparse24(w, M, {kMostProcessors, 0, 0}).splits;
  const int64_t strips = (w.N + kTile - 1) / kTile, chunks = (M + kFewTokens - 1) / kFewTokens;
  constexpr int64_t kPlaces = int64_t{4} * kMostProcessors, kLeastWarps = 4;  // splits_for, at its most
  const int64_t blocks = strips * (is_sparse24(w) ? 1 : chunks), least = (4 * kPlaces + 5 * blocks - 1) / (5 * blocks);
  const int64_t most = ((w.K + kTile - 1) / kTile + kLeastWarps - 1) / kLeastWarps;
  return least <= 1 ? 1 : 2 * least < most ? 2 * least : most;
}

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Where a slab's codes, steps and parts are, and how it is cut.
struct Scratch {
  size_t steps, parts, end;
  int64_t stride;
  Plan plan;
};

Scratch scratch_of(const Weight& w, int64_t M, const Machine& machine) {
  Scratch s{};
  s.plan = is_sparse24(w) ? plan_sparse24(w, M, machine) : plan_decode(w, M, machine);
  s.stride = is_int8(w) ? (w.K + kTile - 1) / kTile * kTile : w.K;
  s.steps = is_int8(w) ? rounded(static_cast<size_t>(M * s.stride)) : 0;
  s.parts = s.steps + (is_int8(w) ? rounded(static_cast<size_t>(M) * sizeof(float)) : 0);
  s.end = s.parts;
  const int64_t splits = most_splits(w, M);
  if (splits > 1) s.end += rounded(static_cast<size_t>(splits) * static_cast<size_t>(M * w.N) * 4);
  return s;
}

cudaError_t run_slab(const Weight& w, const void* x, int64_t M, void* y, unsigned char* workspace,
                     cudaStream_t stream) {
  const Scratch s = scratch_of(w, M, machine());
  if (s.plan.splits > 1 && s.plan.splits > most_splits(w, M)) return cudaErrorInvalidValue;  // no room for the sums
  uint32_t* arrivals = s.plan.splits > 1 && M <= kFewTokens ? w.arrivals : nullptr;
  Call call{x, M, s.stride, nullptr, y, workspace + s.parts, arrivals};
  if (is_int8(w)) {
    float* steps = reinterpret_cast<float*>(workspace + s.steps);
    int8_t* codes = reinterpret_cast<int8_t*>(workspace);
    const cudaError_t error = quantize(w, x, M, s.stride, codes, steps, stream);
    if (error != cudaSuccess) return error;
    call.x = codes;
    call.steps = steps;
  }
  const cudaError_t error =
      is_sparse24(w) ? run_sparse24(w, call, s.plan, stream) : run_decode(w, call, s.plan, stream);
  if (error != cudaSuccess || s.plan.splits == 1 || arrivals) return error;
  return finish(w, call, s.plan.splits, stream);
}

}  // namespace

cudaError_t finish(const Weight& w, const Call& call, int splits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((call.M * w.N + kThreads - 1) / kThreads));
  return is_int8(w) ? launch(sum_of_parts<int32_t>, grid, kThreads, 0, stream, w, call, splits)
                    : launch(sum_of_parts<float>, grid, kThreads, 0, stream, w, call, splits);
}

int splits_here(const Weight& w, int64_t M) { return scratch_of(w, M, machine()).plan.splits; }

size_t workspace_bytes(const Weight& w, int64_t M) {
  if (M <= 0 || w.N <= 0) return 0;
  const Machine here = machine();
  const int64_t most = M < kMostRows ? M : kMostRows;
  size_t bytes = scratch_of(w, most, here).end;
  // Fewer tokens (a last slab, or another call) may need more, since they are cut into more splits.
  for (int64_t m = 8; m < most; m += m < 16 ? 8 : 16) {
    const Scratch s = scratch_of(w, m, here);
    bytes = s.end > bytes ? s.end : bytes;
    if (m > 64 && most_splits(w, m) <= 1) break;
  }
  return bytes;
}

cudaError_t run(const Weight& w, const void* x, int64_t M, void* y, void* workspace, cudaStream_t stream) {
  const int32_t layout = static_cast<int32_t>(w.layout), type = static_cast<int32_t>(w.type);
  if (layout < 16 || layout > 19 || type < 0 || type > 1 || M < 0 || w.K < 0 || w.N < 0) return cudaErrorInvalidValue;
  if (is_int8(w) && !w.scale) return cudaErrorInvalidValue;
  if (w.N == 0) return cudaSuccess;
  for (int64_t row = 0; row < M; row += kMostRows) {
    const int64_t rows = M - row < kMostRows ? M - row : kMostRows;
    const cudaError_t error = run_slab(w, static_cast<const uint16_t*>(x) + row * w.K, rows,
                                       static_cast<uint16_t*>(y) + row * w.N,
                                       static_cast<unsigned char*>(workspace), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace optimize::sparse_matmul::cuda
