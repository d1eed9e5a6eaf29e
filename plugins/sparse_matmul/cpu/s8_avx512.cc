// int8 kernels of AVX-512 with VNNI and VBMI2: 64 stored bytes become a dense group of 16 columns by 4 rows with one
// expansion, which is what one product of VNNI takes.
#include "s8_avx512.h"
#include "unroll.h"

namespace optimize::sparse_matmul {
namespace {

float quantize(const float* x, int64_t K, const float* x_scale, int8_t* codes) {
  float step;
  if (x_scale) {
    step = *x_scale;
  } else {
    Vec top[4] = {zero(), zero(), zero(), zero()};  // four, since each waits for the one before
    int64_t k = 0;
    for (; k + 64 <= K; k += 64)
      OPTIMIZE_UNROLL
      for (int i = 0; i < 4; ++i) top[i] = _mm512_max_ps(top[i], abs(load(x + k + i * 16)));
    for (; k < K; k += 16) top[0] = _mm512_max_ps(top[0], abs(load_first(x + k, K - k < 16 ? K - k : 16)));
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3])));
    step = (largest > 1e-12f ? largest : 1e-12f) / 127.0f;
  }
  const Vec inverse = broadcast(1.0f / step);
  // Conversions to narrower integers saturate: at -128 and 127 in the end.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t k = 0; k < K; k += 64) {
    __m512i part[4];
    OPTIMIZE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t left = K - k - i * 16;
      const Vec v = left >= 16 ? load(x + k + i * 16) : load_first(x + k + i * 16, left > 0 ? left : 0);
      part[i] = _mm512_cvtps_epi32(mul(v, inverse));
    }
    const __m512i low = _mm512_packs_epi32(part[0], part[1]), high = _mm512_packs_epi32(part[2], part[3]);
    _mm512_storeu_si512(codes + k, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
  }
  return step;
}

// The values of a tile, or a copy of them where 64 bytes read at its last one would leave the array.
inline const int8_t* values_of(const Weight& w, int64_t tile, int8_t* copy) {
  const int8_t* all = static_cast<const int8_t*>(w.values);
  const int64_t begin = w.offsets[tile], end = w.offsets[tile + 1];
  if (end + 64 <= w.num_values) return all + begin;
  int64_t count = w.num_values - begin;
  if (count > kTile * kTile) count = kTile * kTile;
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t left = count - i;
    const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    _mm512_storeu_si512(copy + i, _mm512_maskz_loadu_epi8(mask, all + begin + i));
  }
  return copy;
}

constexpr int64_t kCopy = kTile * kTile + 64;

struct Groups {
  __m512i w[4];
};

// The 64 columns of 4 rows; moves `values` on.
inline Groups next_groups(const uint8_t* bitmap, const int8_t*& values) {
  uint64_t mask[4];
  std::memcpy(mask, bitmap, sizeof mask);
  const int64_t a = __builtin_popcountll(mask[0]), b = a + __builtin_popcountll(mask[1]),
                c = b + __builtin_popcountll(mask[2]), d = c + __builtin_popcountll(mask[3]);
  // Far enough for memory: one group takes some nanoseconds.
  _mm_prefetch(reinterpret_cast<const char*>(values + 4096), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(values + 4160), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(bitmap + 1024), _MM_HINT_T0);
  Groups g;
  g.w[0] = _mm512_maskz_expand_epi8(mask[0], _mm512_loadu_si512(values));
  g.w[1] = _mm512_maskz_expand_epi8(mask[1], _mm512_loadu_si512(values + a));
  g.w[2] = _mm512_maskz_expand_epi8(mask[2], _mm512_loadu_si512(values + b));
  g.w[3] = _mm512_maskz_expand_epi8(mask[3], _mm512_loadu_si512(values + c));
  values += d;
  return g;
}

void finish_sums(const Weight& w, int64_t strip, const int32_t* column_sums, const int32_t* sums, const float* steps,
                 int64_t tokens, float* y) {
  for (int64_t j = 0; j < kTile; j += 16) {
    const int64_t column = strip * kTile + j, count = w.N - column < 16 ? w.N - column : 16;
    if (count <= 0) return;
    const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(column_sums + j), 7);
    const Vec scale = load_first(w.scale + column, count);
    const Vec bias = w.bias ? load_first(w.bias + column, count) : zero();
    const int64_t row = w.N;
    const auto each = [&](const auto& apply) {
      const int32_t* from = sums + j;
      float* to = y + column;
      for (int64_t m = 0; m < tokens; ++m, from += kTile, to += row) {
        const Vec sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(from), offset));
        const Vec v = apply(add(mul(mul(sum, broadcast(steps[m])), scale), bias));
        if (count == kLanes)
          store(to, v);
        else
          store_first(to, v, count);
      }
    };
    if (w.activation == Activation::none)
      each([](Vec v) { return v; });
    else
      each([&](Vec v) { return activate(w.activation, v); });
  }
}

// Through memory, so that the sums above can stay in registers.
template <int kM>
inline void finish_strip(const Weight& w, int64_t strip, const int32_t* column_sums, const __m512i (&sums)[kM][4],
                         const float* steps, float* y) {
  alignas(64) int32_t stored[kM * kTile];
  OPTIMIZE_UNROLL
  for (int m = 0; m < kM; ++m)
    OPTIMIZE_UNROLL
    for (int j = 0; j < 4; ++j) _mm512_store_si512(stored + m * kTile + j * 16, sums[m][j]);
  finish_sums(w, strip, column_sums, stored, steps, kM, y);
}

template <int kM>
void small_of(const Weight& w, int64_t strip, const int32_t* column_sums, Codes codes, float* y) {
  __m512i sums[kM][4];
  OPTIMIZE_UNROLL
  for (int m = 0; m < kM; ++m)
    OPTIMIZE_UNROLL
    for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_setzero_si512();
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  alignas(64) int8_t copy[kCopy];
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt;
    const int8_t* values = values_of(w, tile, copy);
    const uint8_t* bitmap = w.bitmap + tile * kBitmapBytes;
    const int8_t* x = codes.data + kt * kTile;
    for (int i = 0; i < 16; ++i) {
      const Groups g = next_groups(bitmap + i * 32, values);
      OPTIMIZE_UNROLL
      for (int m = 0; m < kM; ++m) {
        uint32_t four;
        std::memcpy(&four, x + m * codes.stride + i * 4, 4);
        const __m512i xs = _mm512_set1_epi32(static_cast<int32_t>(four ^ 0x80808080u));  // codes + 128
        OPTIMIZE_UNROLL
        for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_dpbusd_epi32(sums[m][j], xs, g.w[j]);
      }
    }
  }
  finish_strip<kM>(w, strip, column_sums, sums, codes.steps, y);
}

template <int kM = 1>
void small_by_tokens(const Weight& w, int64_t strip, const int32_t* column_sums, Codes codes, int64_t M, float* y) {
  if constexpr (kM < 6)
    if (M > kM) return small_by_tokens<kM + 1>(w, strip, column_sums, codes, M, y);
  small_of<kM>(w, strip, column_sums, codes, y);
}

inline Codes from(Codes codes, int64_t m) { return {codes.data + m * codes.stride, codes.stride, codes.steps + m}; }

// 6 tokens are as many as the registers hold.
void small(const Weight& w, int64_t strip, const int32_t* column_sums, Codes codes, int64_t M, float* y) {
  for (int64_t m = 0; m < M;) {
    const int64_t left = M - m, now = left <= 6 ? left : (left + 1) / 2;
    small_by_tokens(w, strip, column_sums, from(codes, m), now, y + m * w.N);
    m += now;
  }
}

void expand(const Weight& w, int64_t strip, int8_t* dense) {
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  alignas(64) int8_t copy[kCopy];
  const int64_t half = tiles_k * (kTile * kTile / 2);
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt;
    const int8_t* values = values_of(w, tile, copy);
    const uint8_t* bitmap = w.bitmap + tile * kBitmapBytes;
    for (int i = 0; i < 16; ++i, dense += 128) {
      const Groups g = next_groups(bitmap + i * 32, values);
      OPTIMIZE_UNROLL
      for (int j = 0; j < 4; ++j) _mm512_store_si512(dense + j / 2 * half + j % 2 * 64, g.w[j]);
    }
  }
}

void column_sums(const Weight& w, int64_t strip, int32_t* sums) {
  const int64_t tiles_k = (w.K + kTile - 1) / kTile;
  alignas(64) int8_t copy[kCopy];
  __m512i total[4] = {};
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t kt = 0; kt < tiles_k; ++kt) {
    const int64_t tile = strip * tiles_k + kt;
    const int8_t* values = values_of(w, tile, copy);
    for (int i = 0; i < 16; ++i) {
      const Groups g = next_groups(w.bitmap + tile * kBitmapBytes + i * 32, values);
      OPTIMIZE_UNROLL
      for (int j = 0; j < 4; ++j) total[j] = _mm512_dpbusd_epi32(total[j], ones, g.w[j]);
    }
  }
  OPTIMIZE_UNROLL
  for (int j = 0; j < 4; ++j) _mm512_storeu_si512(sums + j * 16, total[j]);
}

template <int kM>
void large_of(const Weight& w, int64_t strip, const int8_t* dense, const int32_t* column_sums, Codes codes, float* y) {
  __m512i sums[kM][4];
  OPTIMIZE_UNROLL
  for (int m = 0; m < kM; ++m)
    OPTIMIZE_UNROLL
    for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_setzero_si512();
  const int64_t rows = (w.K + 3) / 4, half = (w.K + kTile - 1) / kTile * (kTile * kTile / 2);
  for (int64_t i = 0; i < rows; ++i) {
    __m512i ws[4];
    OPTIMIZE_UNROLL
    for (int j = 0; j < 4; ++j) ws[j] = _mm512_load_si512(dense + j / 2 * half + i * 128 + j % 2 * 64);
    OPTIMIZE_UNROLL
    for (int m = 0; m < kM; ++m) {
      uint32_t four;
      std::memcpy(&four, codes.data + m * codes.stride + i * 4, 4);
      const __m512i xs = _mm512_set1_epi32(static_cast<int32_t>(four ^ 0x80808080u));
      OPTIMIZE_UNROLL
      for (int j = 0; j < 4; ++j) sums[m][j] = _mm512_dpbusd_epi32(sums[m][j], xs, ws[j]);
    }
  }
  finish_strip<kM>(w, strip, column_sums, sums, codes.steps, y);
}

template <int kM = 6>
void large_by_tokens(const Weight& w, int64_t strip, const int8_t* dense, const int32_t* column_sums, Codes codes,
                     int64_t M, float* y) {
  if constexpr (kM > 1)
    if (M < kM) return large_by_tokens<kM - 1>(w, strip, dense, column_sums, codes, M, y);
  large_of<kM>(w, strip, dense, column_sums, codes, y);
}

void large(const Weight& w, int64_t strip, const int8_t* dense, const int32_t* column_sums, Codes codes, int64_t M,
           int32_t*, float* y) {
  for (int64_t m = 0; m < M; m += 6)
    large_by_tokens(w, strip, dense, column_sums, from(codes, m), M - m, y + m * w.N);
}

void spread(const int8_t* codes, int64_t windows, int64_t tokens, uint8_t* to) {
  const __m256i offset = _mm256_set1_epi8(-128);
  uint8_t* before = to;  // the high half of the window before this one; of the first, written twice
  for (int64_t i = 0; i < windows; ++i, before = to, to += tokens * 64) {
    const __m256i v = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * 32)), offset);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
    if (i > 0) _mm256_store_si256(reinterpret_cast<__m256i*>(before + 32), v);
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(before + 32), offset);
}

constexpr int64_t kAhead = 24;  // steps

template <int kM>
void window_sums_of(const WindowStep* steps, const uint16_t* places, int64_t count, const uint8_t* block, bool first,
                    int32_t* sums) {
  __m512i sum[kM];
  OPTIMIZE_UNROLL
  for (int m = 0; m < kM; ++m) sum[m] = first ? _mm512_setzero_si512() : _mm512_load_si512(sums + m * kTile);
  for (int64_t i = 0; i < count; ++i) {
    const __m512i rows = _mm512_load_si512(steps[i].rows), weights = _mm512_load_si512(steps[i].weights);
    const uint8_t* window = block + int64_t{places[i]} * (kM * 64);
    _mm_prefetch(reinterpret_cast<const char*>(steps + i + kAhead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(steps + i + kAhead) + 64, _MM_HINT_T0);
    OPTIMIZE_UNROLL
    for (int m = 0; m < kM; ++m) {
      const __m512i codes = _mm512_permutexvar_epi8(rows, _mm512_load_si512(window + m * 64));
      sum[m] = _mm512_dpbusd_epi32(sum[m], codes, weights);
    }
  }
  OPTIMIZE_UNROLL
  for (int m = 0; m < kM; ++m) _mm512_store_si512(sums + m * kTile, sum[m]);
}

template <int kM = kWindowTokens>
void window_sums_by_tokens(const WindowStep* steps, const uint16_t* places, int64_t count, const uint8_t* block,
                           int64_t tokens, bool first, int32_t* sums) {
  if constexpr (kM > 1)
    if (tokens < kM) return window_sums_by_tokens<kM - 1>(steps, places, count, block, tokens, first, sums);
  window_sums_of<kM>(steps, places, count, block, first, sums);
}

void window_sums(const WindowStep* steps, const uint16_t* places, int64_t count, const uint8_t* block, int64_t tokens,
                 bool first, int32_t* sums) {
  window_sums_by_tokens(steps, places, count, block, tokens, first, sums);
}

constexpr S8Dense kKernels{quantize, column_sums, small, expand, large, spread, window_sums, finish_sums};

}  // namespace

const S8Dense* s8_avx512() { return &kKernels; }

}  // namespace optimize::sparse_matmul
