// Unstructured sparse weights times few tokens: the weights are read as they are stored, and multiplied densely by
// tensor cores.
//
// Layout mma16: position p = ((((nb * 4 + kb) * 2 + h) * 8 + g) * 4 + t) * 4 + e of a 64 x 64 tile is the weight at
// k = 16 t + 4 kb + e, n = 16 nb + 8 h + g. One product (nb, kb) of 16 columns by 16 rows takes, in lane (g, t), two
// groups (h) of four weights: four bits of the bitmap, and the values that belong to them, which lie side by side. The
// lanes of a warp read 128 such weights from one run of values, so that few of them meet in a bank of shared memory. Where
// a group begins follows from a table of the 128 words of the tile's bitmap and the number of values before each.
// The rows of W are taken in another order than in the instruction, and those of X^T in the same order: lane (g, t)
// multiplies 16 neighbours of its token's x.
//
// Layout mma8 (int8): p = (((((nb * 2 + kb) * 2 + u) * 2 + v) * 8 + g) * 4 + t) * 4 + e is the weight at
// k = 32 kb + 16 u + 4 t + e, n = 16 nb + 8 v + g: a group of four is one register of the operand, put together from two
// words of values and one permutation of bytes.
#include "decode.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kStages = 2;
constexpr int kTableBytes = 128 * 8;
// Of one tile's values, and what a lane may read after the last one.
template <typename Kind>
constexpr int kStageBytes = kTile * kTile * Kind::kValueBytes + 16;
template <typename Kind>
constexpr int kWarpBytes = kStages * kStageBytes<Kind> + kTableBytes;

__device__ __forceinline__ int count(uint4 bits) { return __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w); }

// 16 neighbours of x from a multiple of 16 on; zero outside of it.
__device__ __forceinline__ void sixteen_of(const uint16_t* x, int64_t row, int64_t k, int64_t rows, int64_t K,
                                           uint32_t* out) {
  if (row < rows && K % 8 == 0 && k + 16 <= K) {
    const uint4* at = reinterpret_cast<const uint4*>(x + row * K + k);
    const uint4 low = __ldg(at), high = __ldg(at + 1);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = two_of(x, row, k + 2 * i, rows, K);
}

// Of the groups of a warp's lanes: the bits of a group, and the place of its first value among the tile's.
struct Groups {
  const uint2* entries;  // of the table, from the lane's own on
  int shift;

  struct Group {
    uint32_t nibble, first;
  };
  __device__ __forceinline__ Group at(int group) const {
    const uint2 entry = entries[group * 4];
    return {entry.x >> shift & 15, entry.y + __popc(entry.x & ((1u << shift) - 1))};
  }
};

// Bit e of a nibble in byte e, and the number of set bits before it.
__device__ __forceinline__ uint32_t spread_bits(uint32_t nibble) { return nibble * 0x00204081u & 0x01010101u; }
__device__ __forceinline__ uint32_t bits_before(uint32_t bits) { return bits * 0x01010100u; }

// 16-bit values in float sums.
template <typename T>
struct Floats {
  using X = uint16_t;
  using Sum = float;
  static constexpr int kValueBytes = 2, kWords = 8;  // words of x of one lane, token and tile

  static __device__ __forceinline__ void load_x(const X* x, int64_t token, int64_t k, int t, int64_t M, int64_t K,
                                                uint32_t* b) {
    sixteen_of(x, token, k + 16 * t, M, K, b);
  }

  // The four weights of a group as two registers.
  static __device__ __forceinline__ void four_of(Groups::Group group, const X* values, uint32_t* low, uint32_t* high) {
    const X* run = values + group.first;
    const uint32_t bits = spread_bits(group.nibble), before = bits_before(bits);
    const uint32_t v0 = run[0], v1 = run[before >> 8 & 0xff], v2 = run[before >> 16 & 0xff], v3 = run[before >> 24];
    // Halves that are not stored come from the upper half of what was read, which is zero.
    *low = __byte_perm(v0, v1, 0x7632u - 0x0022u * (bits & 1) - 0x2200u * (bits >> 8 & 1));
    *high = __byte_perm(v2, v3, 0x7632u - 0x0022u * (bits >> 16 & 1) - 0x2200u * (bits >> 24));
  }

  template <int kTokenTiles>
  static __device__ __forceinline__ void products(int nb, Groups groups, const unsigned char* values,
                                                  const uint32_t (&b)[kTokenTiles][kWords],
                                                  Sum (&sums)[kTokenTiles][4]) {
#pragma unroll
    for (int kb = 0; kb < 4; ++kb) {
      uint32_t a[4];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        four_of(groups.at((nb * 4 + kb) * 2 + h), reinterpret_cast<const X*>(values), &a[h], &a[2 + h]);
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) multiply(T{}, sums[i], a, b[i] + 2 * kb);
    }
  }
};

// int8 values in int32 sums; x as codes, rows of K rounded up to 64.
struct Integers {
  using X = int8_t;
  using Sum = int32_t;
  static constexpr int kValueBytes = 1, kWords = 4;

  static __device__ __forceinline__ void load_x(const X* x, int64_t token, int64_t k, int t, int64_t M, int64_t K,
                                                uint32_t* b) {
    const int64_t row = (K + kTile - 1) / kTile * kTile;
    const uint32_t* at = reinterpret_cast<const uint32_t*>(x + token * row + k) + t;
#pragma unroll
    for (int i = 0; i < kWords; ++i) b[i] = token < M ? __ldg(at + 4 * i) : 0;  // 32 kb + 16 u, i = 2 kb + u
  }

  static __device__ __forceinline__ uint32_t four_of(Groups::Group group, const unsigned char* values) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(values) + group.first / 4;
    const uint32_t run = __funnelshift_r(words[0], words[1], group.first % 4 * 8);
    const uint32_t bits = spread_bits(group.nibble), before = bits_before(bits);
    // What byte e takes: the value of that number, or one of the bytes 4 to 7, which are zero. Four bits each, from bytes.
    const uint32_t from = before | (0x04040404u & ~(bits * 0xffu));
    return __byte_perm(run, 0, __byte_perm(from | from >> 4, 0, 0x4420u));
  }

  template <int kTokenTiles>
  static __device__ __forceinline__ void products(int nb, Groups groups, const unsigned char* values,
                                                  const uint32_t (&b)[kTokenTiles][kWords],
                                                  Sum (&sums)[kTokenTiles][4]) {
#pragma unroll
    for (int kb = 0; kb < 2; ++kb) {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = four_of(groups.at((nb * 2 + kb) * 4 + r), values);
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) multiply_int8(sums[i], a, b[i] + 2 * kb);
    }
  }
};

template <typename Kind, int kTokenTiles>
__global__ void __launch_bounds__(kWarps * 32)
    unstructured(Weight w, const typename Kind::X* x, int64_t M, typename Kind::Sum* parts) {
  OPTIMIZE_SHARED(memory);
  constexpr int kBytes = Kind::kValueBytes, kStage = kStageBytes<Kind>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strip = blockIdx.x, first_token = blockIdx.z * int64_t{kMostTokens};
  const int64_t begin = tiles_k * blockIdx.y / gridDim.y, end = tiles_k * (blockIdx.y + 1) / gridDim.y;
  unsigned char* stages = memory + warp * kWarpBytes<Kind>;
  uint4* table = reinterpret_cast<uint4*>(stages + kStages * kStage);  // two entries {word, values before it} each
  const Groups groups{reinterpret_cast<const uint2*>(table) + g / 2, g % 2 * 16 + t * 4};

  // What says where a tile's values are is read two tiles ahead, and the values one tile ahead.
  struct Place {
    int from, to;
  };
  const auto place_of = [&](int64_t kt) {
    const int64_t tile = strip * tiles_k + kt;
    return kt < end ? Place{__ldg(w.offsets + tile), __ldg(w.offsets + tile + 1)} : Place{0, 0};
  };
  const auto bits_of = [&](int64_t kt) {
    const uint4* at = reinterpret_cast<const uint4*>(w.bitmap + (strip * tiles_k + kt) * 512) + lane;
    return kt < end ? __ldg(at) : uint4{0, 0, 0, 0};
  };
  const auto fetch = [&](Place place, int stage) {
    const unsigned char* source = static_cast<const unsigned char*>(w.values) + int64_t{place.from} * kBytes;
    const int bytes = (place.to - place.from) * kBytes;
    for (int i = lane * 16; i < bytes; i += 512) copy_async(stages + stage * kStage + i, source + i);
    commit_copies();
  };

  typename Kind::Sum sums[4][kTokenTiles][4] = {};
  uint4 bits = bits_of(begin + warp);
  Place next = place_of(begin + warp + kWarps);
  fetch(place_of(begin + warp), 0);
  int stage = 0;
  for (int64_t kt = begin + warp; kt < end; kt += kWarps, stage ^= 1) {
    fetch(next, stage ^ 1);
    next = place_of(kt + 2 * kWarps);
    const uint4 later = bits_of(kt + kWarps);
    uint32_t b[kTokenTiles][Kind::kWords];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) Kind::load_x(x, first_token + i * 8 + g, kt * kTile, t, M, w.K, b[i]);
    const int own = count(bits);
    int start = own;  // inclusive sum over the lanes up to this one
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, start, d);
      if (lane >= d) start += other;
    }
    const uint32_t first = static_cast<uint32_t>(start - own), second = first + __popc(bits.x),
                   third = second + __popc(bits.y), fourth = third + __popc(bits.z);
    table[lane * 2] = uint4{bits.x, first, bits.y, second};
    table[lane * 2 + 1] = uint4{bits.z, third, bits.w, fourth};
    wait_copies<1>();
    __syncwarp();
#pragma unroll
    for (int nb = 0; nb < 4; ++nb) Kind::template products<kTokenTiles>(nb, groups, stages + stage * kStage, b, sums[nb]);
    __syncwarp();
    bits = later;
  }
  wait_copies<0>();
  write_sums<kTokenTiles>(sums, memory, strip, first_token, M, w.N, parts);
}

constexpr int kBlocksPerProcessor = 3;  // as shared memory allows

template <typename T, typename Kind>
cudaError_t run_as(const Weight& w, const typename Kind::X* x, int64_t M, void* y, void* parts, const float* steps,
                   cudaStream_t stream) {
  constexpr int kSums = kWarps * kMostTokens * kTile * 4, kStaged = kWarps * kWarpBytes<Kind>;
  const auto kernel = M <= 8 ? unstructured<Kind, 1> : unstructured<Kind, 2>;
  return launch_strips<T>(kernel, kStaged < kSums ? kSums : kStaged, decode_splits(w, M), w, x, M, y,
                          static_cast<typename Kind::Sum*>(parts), steps, stream);
}

constexpr int kQuantizeThreads = 128;

// One block per token: the largest number, then codes of it and zeros up to the next multiple of 64.
template <typename T>
__global__ void quantize_token(Weight w, const T* x, int8_t* codes, float* steps) {
  OPTIMIZE_SHARED(memory);
  float* largest = reinterpret_cast<float*>(memory);  // [kQuantizeThreads]
  const int64_t token = blockIdx.x, row = (w.K + kTile - 1) / kTile * kTile;
  const T* from = x + token * w.K;
  const int own = static_cast<int>(threadIdx.x);
  float top = 0;
  for (int64_t k = own; k < w.K; k += kQuantizeThreads) top = fmaxf(top, fabsf(static_cast<float>(from[k])));
  largest[own] = top;
  __syncthreads();
  for (int half = kQuantizeThreads / 2; half > 0; half /= 2) {
    if (own < half) largest[own] = fmaxf(largest[own], largest[own + half]);
    __syncthreads();
  }
  const float step = w.x_scale ? *w.x_scale : fmaxf(largest[0], 1e-12f) / 127.0f, inverse = 1.0f / step;
  for (int64_t k = own; k < row; k += kQuantizeThreads) {
    const float v = k < w.K ? rintf(static_cast<float>(from[k]) * inverse) : 0.0f;
    codes[token * row + k] = static_cast<int8_t>(fminf(fmaxf(v, -128.0f), 127.0f));
  }
  if (own == 0) steps[token] = step;
}

template <typename T>
cudaError_t quantize_as(const Weight& w, const void* x, int64_t M, int8_t* codes, float* steps, cudaStream_t stream) {
  const T* from = static_cast<const T*>(x);
  const auto kernel = quantize_token<T>;
  const dim3 grid(static_cast<unsigned>(M));
  OPTIMIZE_LAUNCH(kernel, grid, dim3(kQuantizeThreads), size_t{kQuantizeThreads} * 4, stream, w, from, codes, steps);
  return cudaGetLastError();
}

}  // namespace

int decode_splits(const Weight& w, int64_t M) { return splits_of(w, M, kBlocksPerProcessor); }

cudaError_t decode_mma16(const Weight& w, const void* x, int64_t M, void* y, void* parts, cudaStream_t stream) {
  const uint16_t* from = static_cast<const uint16_t*>(x);
  return w.type == Type::f16 ? run_as<__half, Floats<__half>>(w, from, M, y, parts, nullptr, stream)
                             : run_as<__nv_bfloat16, Floats<__nv_bfloat16>>(w, from, M, y, parts, nullptr, stream);
}

cudaError_t decode_mma8(const Weight& w, const int8_t* codes, const float* steps, int64_t M, void* y, void* parts,
                        cudaStream_t stream) {
  return w.type == Type::f16 ? run_as<__half, Integers>(w, codes, M, y, parts, steps, stream)
                             : run_as<__nv_bfloat16, Integers>(w, codes, M, y, parts, steps, stream);
}

cudaError_t quantize(const Weight& w, const void* x, int64_t M, int8_t* codes, float* steps, cudaStream_t stream) {
  return w.type == Type::f16 ? quantize_as<__half>(w, x, M, codes, steps, stream)
                             : quantize_as<__nv_bfloat16>(w, x, M, codes, steps, stream);
}

}  // namespace optimize::sparse_matmul::cuda
