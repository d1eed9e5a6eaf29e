// Scalar forms of the activations, as the operator's body has them.
#pragma once

#include <cmath>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {

static inline float activate(Activation kind, float v) {
  switch (kind) {
    case Activation::relu:
      return v < 0 ? 0 : v;  // NaN stays NaN
    case Activation::gelu:  // x Phi(x)
      return 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
    case Activation::gelu_tanh:
      return 0.5f * v * (1.0f + std::tanh(0.79788456f * (v + 0.044715f * v * v * v)));
    case Activation::silu:
      return v / (1.0f + std::exp(-v));
    default:
      return v;
  }
}

}  // namespace optimize::sparse_matmul
