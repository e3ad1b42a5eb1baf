// y = x w^T on a CPU in which a row of y has the same bits whatever other rows there are: each of its sums is made in
// one order, where libraries take another for few rows than for many. And few rows, which libraries are slow at, take
// little more than the reading of w.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>

namespace illada {

// y [m, n], x [m, k], w [n, k] of one dtype, float32 or bfloat16, contiguous; none is empty.
using RowProduct = void (*)(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w);

}  // namespace illada

namespace at::native {

DECLARE_DISPATCH(illada::RowProduct, illada_row_product_stub)

}  // namespace at::native
