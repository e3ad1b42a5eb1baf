// Schema, checks and registration of the sweep over logits.

#include "largest.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <tuple>

namespace at::native {

DEFINE_DISPATCH(illada_largest_stub);

}  // namespace at::native

namespace illada {
namespace {

std::tuple<at::Tensor, at::Tensor> empty_results(const at::Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "expected logits [m, v], v at least 1, found ", logits.sizes());
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat, "expected logits in float32, found ", logits.scalar_type());
  return {at::empty({logits.size(0)}, logits.options().dtype(at::kLong)),
          at::empty({logits.size(0)}, logits.options().dtype(at::kDouble))};
}

std::tuple<at::Tensor, at::Tensor> largest(const at::Tensor& logits) {
  auto results = empty_results(logits);
  const auto& [index, rest] = results;
  if (logits.size(0) > 0) at::native::illada_largest_stub(at::kCPU, index, rest, logits.contiguous());
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(illada, library) { library.def("largest(Tensor logits) -> (Tensor index, Tensor rest)"); }

TORCH_LIBRARY_IMPL(illada, CPU, library) { library.impl("largest", &largest); }

TORCH_LIBRARY_IMPL(illada, Meta, library) { library.impl("largest", &empty_results); }

}  // namespace illada
