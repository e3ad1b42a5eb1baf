// What the kernels of the layers do, and how the right build of them for this processor is called.
//
// The kernels are compiled once for each instruction set (setup.py); ATen's dispatch stubs choose among the builds.
#pragma once

#include <ATen/native/DispatchStub.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

namespace illada {

// Tokens [start, start + length) that see each other.
struct Segment {
  int64_t start;
  int64_t length;
};

// Attention over packed segments. Shapes: t tokens, ng KV groups, r query heads in a group, d the size of a head.
struct AttentionProblem {
  at::ScalarType dtype;           // of qkv, out and their gradients: float or bfloat16
  std::vector<Segment> segments;  // one after the other; none is empty
  int64_t tokens;
  int64_t groups;
  int64_t heads_per_group;
  int64_t dim;
  float scale;       // of the scores, > 0
  const float* cos;  // [longest segment, d/2]
  const float* sin;  // [longest segment, d/2]
  const void* qkv;   // [t, ng, r + 2, d]: a group's query heads, its key, its value

  int64_t heads() const { return groups * heads_per_group; }
  int64_t qkv_stride() const { return groups * (heads_per_group + 2) * dim; }
};

// Writes out [t, ng * r, d] and lse [ng * r, t], the logarithm to base 2 of a row's sum of exponentials.
using AttentionForward = void (*)(const AttentionProblem& problem, void* out, float* lse);

// Writes grad_qkv [t, ng, r + 2, d] of grad_out [t, ng * r, d].
using AttentionBackward = void (*)(const AttentionProblem& problem, const void* out, const float* lse,
                                   const void* grad_out, void* grad_qkv);

// x and y [rows, hidden], weight [hidden], all of one type.
struct RmsNormShape {
  at::ScalarType dtype;  // float or bfloat16
  int64_t rows;
  int64_t hidden;
};

// Writes y and rstd [rows].
using RmsNormForward = void (*)(const RmsNormShape& shape, float eps, const void* x, const void* weight, void* y,
                                float* rstd);

// Writes grad_x and grad_weight of grad, the gradient of y.
using RmsNormBackward = void (*)(const RmsNormShape& shape, const void* grad, const void* x, const void* weight,
                                 const float* rstd, void* grad_x, void* grad_weight);

// Writes y [rows, width] of x [rows, 2 * width].
using SwigluForward = void (*)(at::ScalarType dtype, int64_t rows, int64_t width, const void* x, void* y);

// Writes grad_x [rows, 2 * width] of grad [rows, width].
using SwigluBackward = void (*)(at::ScalarType dtype, int64_t rows, int64_t width, const void* grad, const void* x,
                                void* grad_x);

// Calls function<T>(), T being the type that `dtype` names; library.cpp lets no other through.
template <typename Function>
void with_type(at::ScalarType dtype, const Function& function) {
  if (dtype == at::ScalarType::BFloat16) {
    function.template operator()<c10::BFloat16>();
  } else {
    function.template operator()<float>();
  }
}

}  // namespace illada

namespace at::native {  // where the macros have to stand

DECLARE_DISPATCH(illada::AttentionForward, illada_attention_forward_stub)
DECLARE_DISPATCH(illada::AttentionBackward, illada_attention_backward_stub)
DECLARE_DISPATCH(illada::RmsNormForward, illada_rms_norm_forward_stub)
DECLARE_DISPATCH(illada::RmsNormBackward, illada_rms_norm_backward_stub)
DECLARE_DISPATCH(illada::SwigluForward, illada_swiglu_forward_stub)
DECLARE_DISPATCH(illada::SwigluBackward, illada_swiglu_backward_stub)

}  // namespace at::native
