// What both devices' implementations ask of their arguments; each error has the values found.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace illada {

inline void check_logits(const at::Tensor& logits, const at::Tensor& targets, double softcap) {
  TORCH_CHECK(logits.dim() == 2, "logits must be [m, v], found ", logits.sizes());
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "logits must be float32, bfloat16 or float16, found ", dtype);
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, "targets must be int64, found ", targets.scalar_type());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == logits.size(0), "targets must be [", logits.size(0),
              "], one for each row of logits ", logits.sizes(), ", found ", targets.sizes());
  TORCH_CHECK(targets.device() == logits.device(), "targets are on ", targets.device(), ", logits on ",
              logits.device());
  TORCH_CHECK_VALUE(softcap >= 0, "softcap must not be negative (0: none), found ", softcap);
}

inline void check_row_values(const at::Tensor& logits, const at::Tensor& row_values) {
  TORCH_CHECK_TYPE(row_values.scalar_type() == at::kFloat, "row_values must be float32, found ",
                   row_values.scalar_type());
  TORCH_CHECK(row_values.dim() == 2 && row_values.size(0) == 4 && row_values.size(1) == logits.size(0),
              "row_values must be [4, ", logits.size(0), "] for logits ", logits.sizes(), ", found ",
              row_values.sizes());
  TORCH_CHECK(row_values.device() == logits.device(), "row_values are on ", row_values.device(), ", logits on ",
              logits.device());
}

}  // namespace illada
