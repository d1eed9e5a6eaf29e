// x to int8: codes = round(x / step), step = max |x| / 127 of a token, or a static one. Rounds as the operator's body in
// optimizer/custom_ops/declaration.py does: a product with the reciprocal, ties to even, -128 to 127.
#include "common.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kFloor = 1e-12f;  // a token whose largest number is below has the scale of this number

constexpr int kHeld = 4;  // groups of eight numbers that a thread keeps, so that most tokens are read once

__device__ __forceinline__ int8_t code_of(float v, float inverse) {
  return static_cast<int8_t>(fminf(fmaxf(rintf(v * inverse), -128.0f), 127.0f));
}
// Number e of eight.
__device__ __forceinline__ float number(Type type, const uint4& eight, int e) {
  const uint32_t word = e < 2 ? eight.x : e < 4 ? eight.y : e < 6 ? eight.z : eight.w;
  return to_float(type, static_cast<uint16_t>(word >> (e % 2 * 16)));
}

// The largest number of all threads.
__device__ __forceinline__ float largest(float top, float* tops) {
  for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  top = kFloor;
  for (int i = 0; i < kThreads / 32; ++i) top = fmaxf(top, tops[i]);
  return top;
}

// One block for each token.
__global__ void __launch_bounds__(kThreads) token_codes(Weight w, const uint16_t* x, int64_t stride, int8_t* codes,
                                                        float* steps) {
  OPTIMIZE_SHARED(memory);
  const int64_t token = blockIdx.x;
  const uint16_t* from = x + token * w.K;
  int8_t* to = codes + token * stride;
  const bool held = w.K % 8 == 0 && stride <= kHeld * kThreads * 8;
  uint4 eights[kHeld];
  float top = 0;
  if (held) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t k = (threadIdx.x + int64_t{i} * kThreads) * 8;
      eights[i] = k < w.K ? __ldg(reinterpret_cast<const uint4*>(from + k)) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) top = fmaxf(top, fabsf(number(w.type, eights[i], e)));
  } else if (!w.x_scale) {
    for (int64_t k = threadIdx.x; k < w.K; k += kThreads) top = fmaxf(top, fabsf(to_float(w.type, __ldg(from + k))));
  }
  const float step = w.x_scale ? __ldg(w.x_scale) : largest(top, reinterpret_cast<float*>(memory)) / 127.0f;
  if (threadIdx.x == 0) steps[token] = step;
  const float inverse = 1.0f / step;
  if (!held) {
    for (int64_t k = threadIdx.x; k < stride; k += kThreads)
      to[k] = k < w.K ? code_of(to_float(w.type, __ldg(from + k)), inverse) : int8_t{0};
    return;
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t k = (threadIdx.x + int64_t{i} * kThreads) * 8;
    if (k >= stride) continue;
    uint32_t words[2] = {0, 0};  // zeros from K on, whose numbers were read as zeros
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t code = static_cast<uint8_t>(code_of(number(w.type, eights[i], e), inverse));
      words[e / 4] |= code << (e % 4 * 8);
    }
    *reinterpret_cast<uint2*>(to + k) = uint2{words[0], words[1]};
  }
}

}  // namespace

cudaError_t quantize(const Weight& w, const void* x, int64_t M, int64_t stride, int8_t* codes, float* steps,
                     cudaStream_t stream) {
  return launch(token_codes, dim3(static_cast<unsigned>(M)), kThreads, kThreads / 32 * sizeof(float), stream, w,
                static_cast<const uint16_t*>(x), stride, codes, steps);
}

}  // namespace optimize::sparse_matmul::cuda
