// total += a b with bf16 factors and an fp32 total on a CPU, which torch has for CUDA only: its products of bf16 round
// each result to bf16, so that a sum over micro-batches or chunks would be rounded once for each.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>

namespace illada {

// total [m, n] float32, a [m, k] of any strides, b [k, n]; the columns of total and b are contiguous; none is empty.
using AddProduct = void (*)(const at::Tensor& total, const at::Tensor& a, const at::Tensor& b);

}  // namespace illada

namespace at::native {

DECLARE_DISPATCH(illada::AddProduct, illada_add_product_stub)

}  // namespace at::native
