// Schema, checks and registration of the product whose rows do not depend on each other.

#include "row_product.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <vector>

namespace at::native {

DEFINE_DISPATCH(illada_row_product_stub);

}  // namespace at::native

namespace illada {
namespace {

at::Tensor row_product(const at::Tensor& x, const at::Tensor& w) {
  TORCH_CHECK(x.dim() >= 1 && w.dim() == 2 && x.size(-1) == w.size(1), "expected x [..., k] and w [n, k], found ",
              x.sizes(), " and ", w.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE((dtype == at::kFloat || dtype == at::kBFloat16) && w.scalar_type() == dtype,
                   "expected x and w of one dtype, float32 or bfloat16, found ", dtype, " and ", w.scalar_type());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = w.size(0);
  if (x.numel() == 0 || w.numel() == 0) return at::zeros(shape, x.options());
  const at::Tensor rows = x.reshape({-1, x.size(-1)}).contiguous(), factors = w.contiguous();
  at::Tensor y = at::empty({rows.size(0), w.size(0)}, x.options());
  at::native::illada_row_product_stub(at::kCPU, y, rows, factors);
  return y.view(shape);
}

at::Tensor row_product_meta(const at::Tensor& x, const at::Tensor& w) {
  std::vector<c10::SymInt> shape = x.sym_sizes().vec();
  shape.back() = w.sym_size(0);
  return at::empty_symint(shape, x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(illada, library) { library.def("row_product(Tensor x, Tensor w) -> Tensor"); }

TORCH_LIBRARY_IMPL(illada, CPU, library) { library.impl("row_product", &row_product); }

TORCH_LIBRARY_IMPL(illada, Meta, library) { library.impl("row_product", &row_product_meta); }

}  // namespace illada
