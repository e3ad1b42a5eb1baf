// z = softcap tanh(logit / softcap). Included by kernels alone: compiled once for each CPU capability.
#pragma once

#include <cmath>

#include "../cpu/vectors.h"

namespace illada::CPU_CAPABILITY {

template <bool kCapped>
Floats capped(const Floats& logit, float softcap) {
  if constexpr (kCapped) {
    return (logit / Floats(softcap)).tanh() * Floats(softcap);
  } else {
    return logit;
  }
}

inline float capped(float logit, float softcap) { return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit; }

}  // namespace illada::CPU_CAPABILITY
