// Unstructured sparse weights times few tokens: the weights are read as they are stored, and multiplied densely by
// tensor cores. Y^T = W^T X^T: 16 columns of W are the rows of mma.m16n8k16 (or m16n8k32 for int8), 8 tokens its columns.
//
// Layouts mma16 and mma8 have the same order of positions in a 64 x 64 tile: [nb 4][kb 4][h 2][g 8][t 4][e 4], that is
// weight (k, n) with k = 16 t + 4 kb + e and n = 16 nb + 8 h + g. A group (nb, kb, h) is 128 bits, of which lane
// 4 g + t has the nibble of its number, so that the values that a warp's lanes read at the same time lie side by side:
// reads of shared memory meet few bank conflicts (tests/test_cuda_banks.py).
//
// The contraction index of an mma may be permuted, if A and B agree. Lane (g, t) holds of A the rows g and g + 8 and of
// B the column g, in both for the k of its own: for mma.m16n8k16 the indices {2 t, 2 t + 1, 2 t + 8, 2 t + 9}, here
// meaning k = 16 t + 4 kb + 0..3, for mma.m16n8k32 {4 t .. 4 t + 3, 4 t + 16 ..}, here meaning k = 16 t + 8 s + 0..7.
// So a nibble is the half of a lane's row, and all that a lane needs of x are 16 neighbours of one token.
#include "common.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kTableBytes = 128 * 8;  // for each of a tile's 128 bitmap words {word, where its values begin}
constexpr int kMostWarps = 8;

// Four weights {e 0, 1}, {e 2, 3} of 16 bits, whose stored ones begin at `at` of shared memory. Bit e of the nibble is
// spread to byte e. Weight e's value lies behind those of the bits below it (a dot product with 2, 2, .. counts their
// bytes). A loaded value has zeros in its upper half: the selector takes these (bytes 2, 3 or 6, 7), less 0x22 where
// the bit is set, which takes the value.
__device__ __forceinline__ uint2 four(__half, uint32_t at, uint32_t nibble) {
  const uint32_t spread = nibble * 0x00204081u & 0x01010101u;
  const uint32_t v0 = load_shared16(at);
  const uint32_t v1 = load_shared16(__dp4a(spread, 0x00000002u, at));
  const uint32_t v2 = load_shared16(__dp4a(spread, 0x00000202u, at));
  const uint32_t v3 = load_shared16(__dp4a(spread, 0x00020202u, at));
  const uint32_t select = 0x76327632u - 0x22u * spread;
  return uint2{permute(v0, v1, select), permute(v2, v3, select >> 16)};
}
__device__ __forceinline__ uint2 four(__nv_bfloat16, uint32_t at, uint32_t nibble) {
  return four(__half(), at, nibble);
}

// Four weights of 8 bits, in one register: the four bytes from `at` on are cut out of two words. Bit e is spread to
// nibble e of the selector, which is the number of bits below it, plus 4 (a byte of zero) where the bit is not set.
__device__ __forceinline__ uint32_t four(int8_t, uint32_t at, uint32_t nibble) {
  const uint32_t word = at & ~3u;
  const uint32_t bytes = __funnelshift_r(load_shared32(word), load_shared32(word + 4), at << 3);
  const uint32_t pairs = nibble * 0x41u & 0x303u;
  const uint32_t spread = pairs * 9u & 0x1111u;
  return permute(bytes, 0, 0x4444u + spread * (0x1110u - 4u));
}

// What lane (g, t) needs of a token for a tile: 16 numbers from k on, zero outside of x.
__device__ __forceinline__ void read_x(uint32_t (&words)[8], const Call& call, int64_t token, int64_t k) {
#pragma unroll
  for (int i = 0; i < 8; ++i) words[i] = 0;
  if (token >= call.M) return;
  const uint16_t* at = static_cast<const uint16_t*>(call.x) + token * call.stride + k;
  if (call.stride % 8 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (k + half * 8 >= call.stride) continue;
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(at) + half);
      words[half * 4] = v.x, words[half * 4 + 1] = v.y, words[half * 4 + 2] = v.z, words[half * 4 + 3] = v.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (k + i < call.stride) words[i / 2] |= static_cast<uint32_t>(__ldg(at + i)) << (i % 2 * 16);
  }
}
__device__ __forceinline__ void read_x(uint32_t (&words)[4], const Call& call, int64_t token, int64_t k) {
  uint4 v{0, 0, 0, 0};
  const int8_t* at = static_cast<const int8_t*>(call.x) + token * call.stride + k;
  if (token < call.M) v = __ldg(reinterpret_cast<const uint4*>(at));
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// One block: one strip of 64 columns, one share of the tiles along K (blockIdx.y), up to 16 tokens (blockIdx.z). Its
// warps take turns at the tiles, each with `stages` places for the values of tiles on their way.
template <typename T, int kTokenTiles>
__global__ void __launch_bounds__(kMostWarps * 32, 2) strip_products(Weight w, Call call, int stages, int stage_bytes) {
  OPTIMIZE_SHARED(memory);
  using Sum = SumOf<T>;
  constexpr int kBytes = std::is_same_v<T, int8_t> ? 1 : 2;  // of a value
  constexpr int kSteps = 4 / (3 - kBytes);                   // mma instructions along the 64 k of a tile
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile, strip = blockIdx.x;
  const int64_t first_token = blockIdx.z * int64_t{kFewTokens};
  const int64_t begin = tiles_k * blockIdx.y / gridDim.y, end = tiles_k * (blockIdx.y + 1) / gridDim.y;
  const int own = warp * (kTableBytes + stages * stage_bytes), ring = own + kTableBytes;
  const uint2* table = reinterpret_cast<const uint2*>(memory + own) + lane / 8;
  const unsigned char* values = static_cast<const unsigned char*>(w.values);

  // What says where a tile's values are is read a tile before them, they `stages` - 1 tiles before their turn.
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
    const unsigned char* source = values + int64_t{place.from} * kBytes;
    unsigned char* target = memory + ring + stage * stage_bytes;
    const int bytes = (place.to - place.from) * kBytes;
    for (int i = lane * 16; i < bytes; i += 512) copy_async(target + i, source + i);
    commit_copies();
  };

  Sum sums[4][kTokenTiles][4] = {};
  const int64_t first = begin + warp;
  // All of these are on their way before the first is waited for.
  const Place first_place = place_of(first), second_place = place_of(first + warps);
  Place next = place_of(first + 2 * warps);
  uint4 bits = bits_of(first);
  fetch(first_place, 0);
  if (stages == 3) {
    fetch(second_place, 1);
  } else {
    next = second_place;
  }
  int stage = 0;
  for (int64_t kt = first; kt < end; kt += warps) {
    uint32_t x[kTokenTiles][kSteps * 2];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) read_x(x[i], call, first_token + i * 8 + g, kt * kTile + t * 16);
    fetch(next, stage == 0 ? stages - 1 : stage - 1);
    next = place_of(kt + stages * warps);
    const uint4 later = bits_of(kt + warps);
    {
      const int count0 = __popc(bits.x), count1 = count0 + __popc(bits.y), count2 = count1 + __popc(bits.z);
      const int count = count2 + __popc(bits.w);
      int start = count;  // inclusive sum over the lanes up to this one
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, start, d);
        if (lane >= d) start += other;
      }
      const uint32_t at = shared_address(memory) + ring + stage * stage_bytes + (start - count) * kBytes;
      uint4* entries = reinterpret_cast<uint4*>(memory + own) + lane * 2;
      entries[0] = uint4{bits.x, at, bits.y, at + count0 * kBytes};
      entries[1] = uint4{bits.z, at + count1 * kBytes, bits.w, at + count2 * kBytes};
    }
    if (stages == 3) {
      wait_copies<2>();
    } else {
      wait_copies<1>();
    }
    __syncwarp();
    const int shift = lane % 8 * 4;
    const uint32_t below = (1u << shift) - 1;
#pragma unroll
    for (int nb = 0; nb < 4; ++nb) {
      uint2 entries[8];  // all at once, since each is waited for
#pragma unroll
      for (int i = 0; i < 8; ++i) entries[i] = table[(nb * 8 + i) * 4];
      const auto weights = [&](int i) {
        const uint32_t at = entries[i].y + __popc(entries[i].x & below) * kBytes;
        return four(T(), at, entries[i].x >> shift & 15);
      };
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t a[4];
        if constexpr (kBytes == 2) {
          const uint2 upper = weights(s * 2), lower = weights(s * 2 + 1);
          a[0] = upper.x, a[1] = lower.x, a[2] = upper.y, a[3] = lower.y;
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = weights(s * 4 + i);
        }
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          const uint32_t b[2] = {x[i][2 * s], x[i][2 * s + 1]};
          multiply(T(), sums[nb][i], a, b);
        }
      }
    }
    __syncwarp();
    bits = later;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();
  deliver_warps(w, call, memory, strip, first_token, sums);
}

template <typename T>
cudaError_t run_as(const Weight& w, const Call& call, const Plan& plan, cudaStream_t stream) {
  const auto kernel = call.M <= 8 ? strip_products<T, 1> : strip_products<T, 2>;
  return launch(kernel, plan.grid, plan.threads, plan.shared_bytes, stream, w, call, plan.stages, plan.stage_bytes);
}

}  // namespace

Plan plan_decode(const Weight& w, int64_t M, const Machine& machine) {
  const int value_bytes = is_int8(w) ? 1 : 2, token_tiles = M <= 8 ? 1 : 2;
  const int most = w.most_values > 0 && w.most_values < kTile * kTile ? w.most_values : kTile * kTile;
  Plan plan{};
  // Four weights are read from where the first of them may be stored: up to 8 bytes behind the last value.
  plan.stage_bytes = (most * value_bytes + 15) / 16 * 16 + 16;
  const auto bytes = [&](int warps, int stages) {
    const int sums = warps * token_tiles * 8 * kTile * 4, tiles = warps * (kTableBytes + stages * plan.stage_bytes);
    return sums > tiles ? sums : tiles;
  };
  // The most that still lets two blocks be on a multiprocessor (each costs it 1 KiB more), or else what fits.
  const int limit = machine.shared_processor / 2 - 1024;
  int warps = 4;
  plan.stages = 2;
  for (const auto& [some_warps, some_stages] : {std::pair{8, 3}, std::pair{8, 2}, std::pair{4, 3}}) {
    if (bytes(some_warps, some_stages) <= limit && bytes(some_warps, some_stages) <= machine.shared_block) {
      warps = some_warps, plan.stages = some_stages;
      break;
    }
  }
  plan.threads = warps * 32;
  plan.shared_bytes = bytes(warps, plan.stages);
  const int64_t strips = (w.N + kTile - 1) / kTile, chunks = (M + kFewTokens - 1) / kFewTokens;
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  int64_t resident = machine.shared_processor / (plan.shared_bytes + 1024);
  resident = resident < 1 ? 1 : resident > 16 / warps ? 16 / warps : resident;  // registers: 16 warps
  plan.splits = splits_for(strips * chunks, tiles_k, warps, resident, machine.processors);
  plan.grid = dim3(static_cast<unsigned>(strips), static_cast<unsigned>(plan.splits), static_cast<unsigned>(chunks));
  return plan;
}

cudaError_t run_decode(const Weight& w, const Call& call, const Plan& plan, cudaStream_t stream) {
  if (is_int8(w)) return run_as<int8_t>(w, call, plan, stream);
  return w.type == Type::f16 ? run_as<__half>(w, call, plan, stream) : run_as<__nv_bfloat16>(w, call, plan, stream);
}

}  // namespace optimize::sparse_matmul::cuda
