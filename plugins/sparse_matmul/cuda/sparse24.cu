// 2:4 sparse weights (two of every four neighbours along K) by mma.sp, which takes the two values and two bits for each
// that say where among the four it is. Y^T = W^T X^T: 16 columns of W are the rows of A, 8 tokens the columns of B.
//
// A tile of 64 x 64 is stored as fragments, one for 16 columns (nb) and one instruction's k (s): sp16 has 4 x 2 of
// mma.sp.m16n8k32, sp8 has 4 x 1 of m16n8k64. Fragment nb * steps + s holds for each lane 4 g + t its four registers of
// A (16 bytes), of row g (registers 0, 2) and g + 8 (1, 3). Registers 0 and 1 have
//   sp16   the stored two of k = 32 s + 4 t ..+3, registers 2 and 3 those of the k 16 further;
//   sp8    the stored two and two of k = 8 t ..+7, registers 2 and 3 those of the k 32 further.
// Metadata: lane l has four words, word nb for the columns nb, a nibble for every four k (index of the first stored
// value in bits 0-1, of the second in 2-3, ascending):
//   sp16   lanes t = 2 s, 2 s + 1 serve step s (that is the sparsity selector): k = 32 s + 16 (t % 2) ..+15 of row g in
//          the lower half of the word, of row g + 8 in the upper half;
//   sp8    every lane: k = 32 (t / 2) ..+31 of row g + 8 (t % 2).
// (PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16/.bf16" and "mma.m16n8k64 with .u8/.s8".)
//
// The same tables are in emulation/mma.h; benchmarks/gpu.py probes them on a GPU (right on sm_90), and metadata agree with
// how CUTLASS reorders them.
//
// Of B, lane (g, t) holds in register i of a step the token g and the 4 bytes from byte 16 i + 4 t of the step's k on.
#include "common.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kValuesOfTile = kTile * kTile / 2;
constexpr int kMetadataBytes = 512;  // of a tile

template <typename T>
constexpr int kBytesOf = std::is_same_v<T, int8_t> ? 1 : 2;
template <typename T>
constexpr int kStepsOf = kBytesOf<T>;  // instructions along a tile's k

__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <typename T>
__device__ __forceinline__ void multiply_step(int step, SumOf<T> (&d)[4], const uint4& a, const uint32_t (&b)[4],
                                              uint32_t metadata) {
  if (step == 0) {
    multiply_sparse<0>(T(), d, a, b, metadata);
  } else if constexpr (kStepsOf<T> == 2) {
    multiply_sparse<1>(T(), d, a, b, metadata);
  }
}

// The 4 bytes of a token from k on, zero outside of x.
__device__ __forceinline__ uint32_t read_x(__half, const Call& call, int64_t token, int64_t k) {
  if (token >= call.M || k >= call.stride) return 0;
  const uint16_t* at = static_cast<const uint16_t*>(call.x) + token * call.stride + k;
  if (call.stride % 2 == 0) return __ldg(reinterpret_cast<const uint32_t*>(at));
  return __ldg(at) | static_cast<uint32_t>(k + 1 < call.stride ? __ldg(at + 1) : 0) << 16;
}
__device__ __forceinline__ uint32_t read_x(__nv_bfloat16, const Call& call, int64_t token, int64_t k) {
  return read_x(__half(), call, token, k);
}
__device__ __forceinline__ uint32_t read_x(int8_t, const Call& call, int64_t token, int64_t k) {
  if (token >= call.M) return 0;
  return __ldg(reinterpret_cast<const uint32_t*>(static_cast<const int8_t*>(call.x) + token * call.stride + k));
}

constexpr int kFewWarps = 4;

// Up to 16 tokens: nothing is used twice, so fragments go from memory to registers, a tile ahead of their use. One
// block: one strip of 64 columns, one share of the tiles along K (blockIdx.y), which its warps take in turns.
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kFewWarps * 32) few_tokens(Weight w, Call call) {
  OPTIMIZE_SHARED(memory);
  using Sum = SumOf<T>;
  constexpr int kSteps = kStepsOf<T>, kFragments = 4 * kSteps, kWords = 4 / kBytesOf<T>;  // k of 4 bytes
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strip = blockIdx.x;
  const int64_t begin = tiles_k * blockIdx.y / gridDim.y, end = tiles_k * (blockIdx.y + 1) / gridDim.y;
  const uint4* values = static_cast<const uint4*>(w.values) + strip * tiles_k * kFragments * 32 + lane;
  const uint4* metadata = reinterpret_cast<const uint4*>(w.bitmap) + strip * tiles_k * 32 + lane;

  Sum sums[4][kTokenTiles][4] = {};
  uint4 a[kFragments], places{0, 0, 0, 0};
  const auto fetch = [&](int64_t kt) {
    if (kt >= end) return;
    places = __ldg(metadata + kt * 32);
#pragma unroll
    for (int f = 0; f < kFragments; ++f) a[f] = __ldg(values + (kt * kFragments + f) * 32);
  };
#pragma unroll
  for (int f = 0; f < kFragments; ++f) a[f] = uint4{0, 0, 0, 0};
  fetch(begin + warp);
  for (int64_t kt = begin + warp; kt < end; kt += kFewWarps) {
    uint32_t b[kTokenTiles][kSteps][4];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i)
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          b[i][s][r] = read_x(T(), call, i * 8 + g, kt * kTile + ((s * 4 + r) * 4 + t) * kWords);
    uint4 now[kFragments];
    const uint4 now_places = places;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) now[f] = a[f];
    fetch(kt + kFewWarps);
#pragma unroll
    for (int nb = 0; nb < 4; ++nb)
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i)
          multiply_step<T>(s, sums[nb][i], now[nb * kSteps + s], b[i][s], word_of(now_places, nb));
  }
  deliver_warps(w, call, memory, strip, 0, sums);
}

// Many tokens. One block: two strips of 64 columns, 32 tokens for each of kWarpsM pairs of warps, one share of the tiles
// along K (blockIdx.z). A warp: 64 columns x 32 tokens. Stages of one tile along K are copied two ahead.
constexpr int kStages = 3, kStrips = 2, kTokensOfWarp = 32, kPitch = kTile + 4;

template <typename T, int kWarpsM>
struct Shape {
  static constexpr int kTokens = kWarpsM * kTokensOfWarp, kThreads = kStrips * kWarpsM * 32;
  static constexpr int kRowBytes = kTile * kBytesOf<T>, kChunks = kRowBytes / 16;  // of x: a token's part of a stage
  static constexpr int kTileBytes = kValuesOfTile * kBytesOf<T>;
  static constexpr int kMetadata = kStrips * kTileBytes, kX = kMetadata + kStrips * kMetadataBytes;
  static constexpr int kStageBytes = kX + kTokens * kRowBytes;
  static constexpr int kSumBytes = kStrips * kWarpsM * kTokensOfWarp * kPitch * 4;
  static constexpr int kBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;

  // Where a token's 16-byte chunk lies: eight tokens' chunks of the same k are in eight different groups of banks.
  __device__ static int place(int token, int chunk) {
    const int turned = kChunks == 8 ? chunk ^ (token & 7) : chunk ^ (token >> 1 & 3);
    return kX + token * kRowBytes + turned * 16;
  }
};

template <typename T, int kWarpsM>
__device__ __forceinline__ void fetch_stage(const Weight& w, const Call& call, unsigned char* stage, int64_t kt) {
  using S = Shape<T, kWarpsM>;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strips = (w.N + kTile - 1) / kTile;
  const unsigned char* values = static_cast<const unsigned char*>(w.values);
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
    const bool valid = int64_t{blockIdx.x} * kStrips + strip < strips;
    const int64_t tile = valid ? (int64_t{blockIdx.x} * kStrips + strip) * tiles_k + kt : 0;
    for (int i = threadIdx.x * 16; i < S::kTileBytes; i += S::kThreads * 16)
      copy_async(stage + strip * S::kTileBytes + i, values + tile * S::kTileBytes + i, valid);
    // Zeros would be no sound metadata: a strip that does not exist has zeros with the places of another.
    if (const int i = threadIdx.x * 16; i < kMetadataBytes)
      copy_async(stage + S::kMetadata + strip * kMetadataBytes + i, w.bitmap + tile * kMetadataBytes + i);
  }
  constexpr int kNumbers = 16 / kBytesOf<T>;  // of a chunk
  for (int i = threadIdx.x; i < S::kTokens * S::kChunks; i += S::kThreads) {
    const int row = i / S::kChunks, chunk = i % S::kChunks;
    const int64_t token = int64_t{blockIdx.y} * S::kTokens + row, k = kt * kTile + chunk * kNumbers;
    const bool valid = token < call.M && k < call.stride;
    const unsigned char* from = static_cast<const unsigned char*>(call.x) +
                                (valid ? (token * call.stride + k) * kBytesOf<T> : 0);
    unsigned char* to = stage + S::place(row, chunk);
    if (kBytesOf<T> == 1 || call.stride % 8 == 0) {
      copy_async(to, from, valid);
      continue;
    }
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t bits = valid && k + e < call.stride ? __ldg(reinterpret_cast<const uint16_t*>(from) + e) : 0;
      words[e / 2] |= bits << (e % 2 * 16);
    }
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
  }
}

template <typename T, int kWarpsM>
__global__ void __launch_bounds__(Shape<T, kWarpsM>::kThreads) many_tokens(Weight w, Call call) {
  OPTIMIZE_SHARED(memory);
  using S = Shape<T, kWarpsM>;
  using Sum = SumOf<T>;
  constexpr int kSteps = kStepsOf<T>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int strip = warp % kStrips, first_row = warp / kStrips * kTokensOfWarp;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  const int64_t begin = tiles_k * blockIdx.z / gridDim.z, end = tiles_k * (blockIdx.z + 1) / gridDim.z;

  Sum sums[4][4][4] = {};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) fetch_stage<T, kWarpsM>(w, call, memory + i * S::kStageBytes, begin + i);
    commit_copies();
  }
  int slot = 0;
  for (int64_t kt = begin; kt < end; ++kt) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the stage is here, and the one before it was used by all
    const int free_slot = slot == 0 ? kStages - 1 : slot - 1;
    if (kt + kStages - 1 < end)
      fetch_stage<T, kWarpsM>(w, call, memory + free_slot * S::kStageBytes, kt + kStages - 1);
    commit_copies();
    const unsigned char* stage = memory + slot * S::kStageBytes;
    const uint4* fragments = reinterpret_cast<const uint4*>(stage + strip * S::kTileBytes) + lane;
    const uint4 places = reinterpret_cast<const uint4*>(stage + S::kMetadata + strip * kMetadataBytes)[lane];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t b[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_matrices(b[i], stage + S::place(first_row + i * 8 + lane % 8, s * 4 + lane / 8));
#pragma unroll
      for (int nb = 0; nb < 4; ++nb) {
        const uint4 a = fragments[(nb * kSteps + s) * 32];
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_step<T>(s, sums[nb][i], a, b[i], word_of(places, nb));
      }
    }
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
  wait_copies<0>();
  __syncthreads();
  // Through shared memory, so that rows of y are written by neighbours.
  Sum* shared = reinterpret_cast<Sum*>(memory) + warp * kTokensOfWarp * kPitch;
#pragma unroll
  for (int nb = 0; nb < 4; ++nb)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        shared[(i * 8 + 2 * t + r % 2) * kPitch + nb * 16 + g + r / 2 * 8] = sums[nb][i][r];
  __syncwarp();
  for (int i = lane; i < kTokensOfWarp * kTile; i += 32) {
    const int64_t token = int64_t{blockIdx.y} * S::kTokens + first_row + i / kTile;
    const int64_t column = (int64_t{blockIdx.x} * kStrips + strip) * kTile + i % kTile;
    if (token < call.M && column < w.N)
      deliver(w, call, blockIdx.z, gridDim.z, token, column, shared[i / kTile * kPitch + i % kTile]);
  }
}

// Tokens of a block: 128, or 64 where that is enough.
int warps_for(int64_t M) { return M <= 64 ? 2 : 4; }

template <typename T>
cudaError_t run_as(const Weight& w, const Call& call, const Plan& plan, cudaStream_t stream) {
  if (call.M <= kFewTokens) {
    const auto kernel = call.M <= 8 ? few_tokens<T, 1> : few_tokens<T, 2>;
    const int bytes = kFewWarps * (call.M <= 8 ? 8 : 16) * kTile * 4;
    return launch(kernel, plan.grid, kFewWarps * 32, bytes, stream, w, call);
  }
  if (warps_for(call.M) == 2)
    return launch(many_tokens<T, 2>, plan.grid, Shape<T, 2>::kThreads, Shape<T, 2>::kBytes, stream, w, call);
  return launch(many_tokens<T, 4>, plan.grid, Shape<T, 4>::kThreads, Shape<T, 4>::kBytes, stream, w, call);
}

}  // namespace

Plan plan_sparse24(const Weight& w, int64_t M, const Machine& machine) {
  const int64_t strips = (w.N + kTile - 1) / kTile, tiles_k = (w.K + kTile - 1) / kTile;
  Plan plan{};
  if (M <= kFewTokens) {
    plan.splits = splits_for(strips, tiles_k, kFewWarps, 4, machine.processors);  // registers: 16 warps
    plan.grid = dim3(static_cast<unsigned>(strips), static_cast<unsigned>(plan.splits), 1);
    return plan;
  }
  const int64_t wide = (strips + kStrips - 1) / kStrips, tokens = warps_for(M) * kTokensOfWarp;
  const int64_t high = (M + tokens - 1) / tokens;
  // Where blocks are fewer than multiprocessors; a split has eight tiles, lest its sums cost more than it gains.
  int64_t splits = machine.processors / (wide * high);
  splits = splits > 8 ? 8 : splits;
  splits = splits > tiles_k / 8 ? tiles_k / 8 : splits;
  plan.splits = static_cast<int>(splits < 1 ? 1 : splits);
  plan.grid = dim3(static_cast<unsigned>(wide), static_cast<unsigned>(high), static_cast<unsigned>(plan.splits));
  return plan;
}

cudaError_t run_sparse24(const Weight& w, const Call& call, const Plan& plan, cudaStream_t stream) {
  if (is_int8(w)) return run_as<int8_t>(w, call, plan, stream);
  return w.type == Type::f16 ? run_as<__half>(w, call, plan, stream) : run_as<__nv_bfloat16>(w, call, plan, stream);
}

}  // namespace optimize::sparse_matmul::cuda
