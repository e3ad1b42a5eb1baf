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

inline void check_row_values(const at::Tensor& logits, const at::Tensor& log_normalizer,
                             const at::Tensor& softmax_scale, const at::Tensor& label_scale) {
  const auto check = [&](const char* name, const at::Tensor& values) {
    TORCH_CHECK_TYPE(values.scalar_type() == at::kFloat, name, " must be float32, found ", values.scalar_type());
    TORCH_CHECK(values.dim() == 1 && values.size(0) == logits.size(0), name, " must be [", logits.size(0),
                "], one for each row of logits ", logits.sizes(), ", found ", values.sizes());
    TORCH_CHECK(values.device() == logits.device(), name, " is on ", values.device(), ", logits on ", logits.device());
  };
  check("log_normalizer", log_normalizer);
  check("softmax_scale", softmax_scale);
  check("label_scale", label_scale);
}

}  // namespace illada
