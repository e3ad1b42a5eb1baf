// A chunk's logits, their statistics, gradients and all three products in two sweeps over the head's rows, on a CPU.
//
// The logits are kept transposed, [ids of the vocabulary, masked rows]: then the head's rows are a product's left
// factor as they lie in memory, for the logits and for their own gradient.
#pragma once

#include <ATen/native/DispatchStub.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace illada {

struct HeadBlocks {
  at::ScalarType dtype;    // of hidden, weight and logits: float32 or bfloat16
  int64_t rows;            // m, masked rows
  int64_t lanes;           // m up to a multiple of 32: what a row of the logits holds
  int64_t ids;             // v
  int64_t width;           // h; even
  const void* hidden;      // [m, h]
  const void* weight;      // [v, h]
  const int64_t* targets;  // [m], outside [0, v): held elsewhere
  float softcap;           // 0: none
};

// logits [v, lanes] and statistics [3, m] (maximum of z, sum of exp(z - maximum), z of the target or -inf) are written.
using LogitsInBlocks = void (*)(const HeadBlocks& problem, void* logits, float* statistics);

// hidden_gradient [m, h] in dtype is written; weight_gradient [v, h] is added to: floats, or (`rounded`) in dtype.
// row_values [4, m]: maximum, log of the sum, the softmax's scale and the label's.
using GradientsInBlocks = void (*)(const HeadBlocks& problem, const void* logits, const float* row_values,
                                   void* hidden_gradient, void* weight_gradient, bool rounded);

}  // namespace illada

namespace at::native {  // where the macros have to stand

DECLARE_DISPATCH(illada::LogitsInBlocks, illada_logits_in_blocks_stub)
DECLARE_DISPATCH(illada::GradientsInBlocks, illada_gradients_in_blocks_stub)

}  // namespace at::native
