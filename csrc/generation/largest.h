// The largest logit of each row, and how much of the softmax the others have: in one sweep over all rows that a pass of
// generation returns. A row's results are the same bits whatever other rows there are.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>

namespace illada {

// index [m] int64, rest [m] float64, logits [m, v] float32, contiguous; none is empty.
using Largest = void (*)(const at::Tensor& index, const at::Tensor& rest, const at::Tensor& logits);

}  // namespace illada

namespace at::native {

DECLARE_DISPATCH(illada::Largest, illada_largest_stub)

}  // namespace at::native
