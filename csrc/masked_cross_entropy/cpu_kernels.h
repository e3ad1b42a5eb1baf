// What the vectorised kernels do, and how the right build of them for this processor is called.
//
// cpu_kernels.cpp is compiled once for each instruction set (setup.py); ATen's dispatch stubs choose among the builds
// as for torch's own kernels, so the environment variable ATEN_CPU_CAPABILITY holds here too.
#pragma once

#include <ATen/core/TensorBase.h>
#include <ATen/native/DispatchStub.h>

namespace illada {

// statistics [3, m] float32, overwritten: row maximum, sum of exp(z - maximum), z of the target or -inf.
using LogitStatistics = void (*)(const at::TensorBase& statistics, const at::TensorBase& logits,
                                 const at::TensorBase& targets, float softcap);

// logits [m, v], overwritten by the gradient of the loss with respect to them; row_values [4, m] float32, contiguous: a
// row's maximum, log of its sum of exp(z - maximum), the softmax's scale and the label's.
using LogitsToGradient = void (*)(const at::TensorBase& logits, const at::TensorBase& targets,
                                  const at::TensorBase& row_values, float softcap);

}  // namespace illada

namespace at::native {  // where the macros have to stand

DECLARE_DISPATCH(illada::LogitStatistics, illada_logit_statistics_stub)
DECLARE_DISPATCH(illada::LogitsToGradient, illada_logits_to_gradient_stub)

}  // namespace at::native
