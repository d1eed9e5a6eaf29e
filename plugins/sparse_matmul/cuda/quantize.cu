// x to int8: codes = round(x / step), step = max |x| / 127 of a token, or a static one. Rounds as the operator's body in
// optimizer/custom_ops/declaration.py does: a product with the reciprocal, ties to even, -128 to 127.
#include "common.h"

namespace optimize::sparse_matmul::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kFloor = 1e-12f;  // a token whose largest number is below has the scale of this number

// One block for each token.
__global__ void __launch_bounds__(kThreads) token_codes(Weight w, const uint16_t* x, int64_t stride, int8_t* codes,
                                                        float* steps) {
  OPTIMIZE_SHARED(memory);
  float* tops = reinterpret_cast<float*>(memory);  // [kThreads / 32]
  const int64_t token = blockIdx.x;
  const uint16_t* from = x + token * w.K;
  float step;
  if (w.x_scale) {
    step = __ldg(w.x_scale);
  } else {
    float top = 0;
    for (int64_t k = threadIdx.x; k < w.K; k += kThreads) top = fmaxf(top, fabsf(to_float(w.type, __ldg(from + k))));
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    top = kFloor;
    for (int i = 0; i < kThreads / 32; ++i) top = fmaxf(top, tops[i]);
    step = top / 127.0f;
  }
  if (threadIdx.x == 0) steps[token] = step;
  const float inverse = 1.0f / step;
  for (int64_t k = threadIdx.x; k < stride; k += kThreads) {
    float code = 0;
    if (k < w.K) code = fminf(fmaxf(rintf(to_float(w.type, __ldg(from + k)) * inverse), -128.0f), 127.0f);
    codes[token * stride + k] = static_cast<int8_t>(code);
  }
}

}  // namespace

cudaError_t quantize(const Weight& w, const void* x, int64_t M, int64_t stride, int8_t* codes, float* steps,
                     cudaStream_t stream) {
  return launch(token_codes, dim3(static_cast<unsigned>(M)), kThreads, kThreads / 32 * sizeof(float), stream, w,
                static_cast<const uint16_t*>(x), stride, codes, steps);
}

}  // namespace optimize::sparse_matmul::cuda
