#include "products.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <vector>

namespace illada {
namespace {

// oneDNN says what it multiplies only by refusing to.
template <typename T>
bool multiplies() {
  static const bool found = [] {
    constexpr int64_t n = 32;
    constexpr bool pairs = sizeof(T) == 2;
    std::vector<T> operands(n * n);
    std::vector<float> product(n * n);
    try {
      at::native::cpublas::brgemm(n, n, n, n, n, n, false, operands.data(), operands.data(), product.data(), pairs);
      at::native::cpublas::brgemm_release(pairs);
    } catch (const c10::Error&) {
      return false;
    }
    return true;
  }();
  return found;
}

}  // namespace

bool has_cpu_products(at::ScalarType dtype) {
  return (dtype == at::kFloat && multiplies<float>()) || (dtype == at::kBFloat16 && multiplies<at::BFloat16>());
}

TORCH_LIBRARY_FRAGMENT(illada, library) {
  library.def("has_cpu_products(ScalarType dtype) -> bool", &has_cpu_products);
}

}  // namespace illada
