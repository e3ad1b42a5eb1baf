// Schema of the two passes, their checks, the meta functions and the CPU implementation.
// cuda_launcher.cpp registers the CUDA one.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu_kernels.h"

namespace at::native {

DEFINE_DISPATCH(illada_logit_statistics_stub);
DEFINE_DISPATCH(illada_logits_to_gradient_stub);

}  // namespace at::native

namespace illada {
namespace {

at::Tensor logit_statistics_cpu(const at::Tensor& logits, const at::Tensor& targets, double softcap) {
  check_logits(logits, targets, softcap);
  at::Tensor statistics = at::empty({3, logits.size(0)}, logits.options().dtype(at::kFloat));
  at::native::illada_logit_statistics_stub(at::kCPU, statistics, logits, targets.contiguous(),
                                           static_cast<float>(softcap));
  return statistics;
}

void logits_to_gradient_cpu(at::Tensor& logits, const at::Tensor& targets, const at::Tensor& row_values,
                            double softcap) {
  check_logits(logits, targets, softcap);
  check_row_values(logits, row_values);
  at::native::illada_logits_to_gradient_stub(at::kCPU, logits, targets.contiguous(), row_values.contiguous(),
                                             static_cast<float>(softcap));
}

at::Tensor logit_statistics_meta(const at::Tensor& logits, const at::Tensor&, double) {
  return at::empty_symint({3, logits.sym_size(0)}, logits.options().dtype(at::kFloat));
}

void logits_to_gradient_meta(at::Tensor&, const at::Tensor&, const at::Tensor&, double) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(illada, library) {
  library.def("logit_statistics(Tensor logits, Tensor targets, float softcap) -> Tensor");
  library.def("logits_to_gradient_(Tensor(a!) logits, Tensor targets, Tensor row_values, float softcap) -> ()");
}

TORCH_LIBRARY_IMPL(illada, CPU, library) {
  library.impl("logit_statistics", &logit_statistics_cpu);
  library.impl("logits_to_gradient_", &logits_to_gradient_cpu);
}

TORCH_LIBRARY_IMPL(illada, Meta, library) {
  library.impl("logit_statistics", &logit_statistics_meta);
  library.impl("logits_to_gradient_", &logits_to_gradient_meta);
}

}  // namespace illada
