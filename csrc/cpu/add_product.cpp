// Schema, checks and registration of the product that is added to a sum.

#include "add_product.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include "products.h"

namespace at::native {

DEFINE_DISPATCH(illada_add_product_stub);

}  // namespace at::native

namespace illada {
namespace {

void add_product_(at::Tensor& total, const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK(total.dim() == 2 && a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) &&
                  total.size(0) == a.size(0) && total.size(1) == b.size(1),
              "expected total [m, n] += a [m, k] b [k, n], found ", total.sizes(), ", ", a.sizes(), ", ", b.sizes());
  TORCH_CHECK_TYPE(
      total.scalar_type() == at::kFloat && a.scalar_type() == at::kBFloat16 && b.scalar_type() == at::kBFloat16,
      "expected total float32, a and b bfloat16, found ", total.scalar_type(), ", ", a.scalar_type(), ", ",
      b.scalar_type());
  TORCH_CHECK(total.stride(1) == 1 && b.stride(1) == 1, "the columns of total and b must be contiguous, found strides ",
              total.strides(), " and ", b.strides());
  TORCH_CHECK_NOT_IMPLEMENTED(has_cpu_products(at::kBFloat16), "this processor's products take no bfloat16");
  if (total.numel() > 0 && a.numel() > 0) {
    at::native::illada_add_product_stub(at::kCPU, total, a, b);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(illada, library) { library.def("add_product_(Tensor(a!) total, Tensor a, Tensor b) -> ()"); }

TORCH_LIBRARY_IMPL(illada, CPU, library) { library.impl("add_product_", &add_product_); }

TORCH_LIBRARY_IMPL(illada, Meta, library) {
  library.impl("add_product_", +[](at::Tensor&, const at::Tensor&, const at::Tensor&) {});
}

}  // namespace illada
