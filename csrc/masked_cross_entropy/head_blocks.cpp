// Schemas, checks and registration of the two sweeps.

#include "head_blocks.h"

#include <ATen/ops/empty.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstdint>

#include "../cpu/products.h"

namespace at::native {

DEFINE_DISPATCH(illada_logits_in_blocks_stub);
DEFINE_DISPATCH(illada_gradients_in_blocks_stub);

}  // namespace at::native

namespace illada {
namespace {

constexpr int64_t kMultiple = 32;

// Everything but row_values and the gradients; the tensors have to outlive it.
HeadBlocks problem_of(const at::Tensor& logits, const at::Tensor& hidden, const at::Tensor& weight,
                      const at::Tensor& targets, double softcap) {
  const auto dtype = hidden.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(has_cpu_products(dtype), "this processor's products take no ", dtype);
  TORCH_CHECK_TYPE(weight.scalar_type() == dtype && logits.scalar_type() == dtype,
                   "weight and logits must be of hidden's type, ", dtype, ", found ", weight.scalar_type(), " and ",
                   logits.scalar_type());
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && hidden.size(1) % 2 == 0,
              "hidden must be [m, h] and weight [v, h] with an even h, found ", hidden.sizes(), " and ",
              weight.sizes());
  const int64_t rows = hidden.size(0), lanes = (rows + kMultiple - 1) / kMultiple * kMultiple, ids = weight.size(0);
  TORCH_CHECK(logits.dim() == 2 && logits.size(0) == ids && logits.size(1) == lanes, "logits must be [", ids, ", ",
              lanes, "] for ", rows, " rows, found ", logits.sizes());
  TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous() && logits.is_contiguous() && targets.is_contiguous(),
              "hidden, weight, logits and targets must be contiguous");
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong, "targets must be int64, found ", targets.scalar_type());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == rows, "targets must be [", rows, "], found ", targets.sizes());
  TORCH_CHECK_VALUE(softcap >= 0, "softcap must not be negative (0: none), found ", softcap);
  return {dtype,
          rows,
          lanes,
          ids,
          hidden.size(1),
          hidden.const_data_ptr(),
          weight.const_data_ptr(),
          targets.const_data_ptr<int64_t>(),
          static_cast<float>(softcap)};
}

// The logits are written into fresh memory: with pages of 2 MB, where Linux gives them, the faults cost a fifth.
void ask_for_huge_pages([[maybe_unused]] const at::Tensor& memory) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(memory.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, end = (begin + memory.nbytes()) / kPage * kPage;
  if (first < end) {
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a hint: where it is refused nothing changes
  }
#endif
}

at::Tensor logits_in_blocks(at::Tensor& logits, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& targets, double softcap) {
  const HeadBlocks problem = problem_of(logits, hidden, weight, targets, softcap);
  ask_for_huge_pages(logits);
  at::Tensor statistics = at::empty({3, problem.rows}, hidden.options().dtype(at::kFloat));
  at::native::illada_logits_in_blocks_stub(at::kCPU, problem, logits.mutable_data_ptr(),
                                           statistics.mutable_data_ptr<float>());
  return statistics;
}

void gradients_in_blocks(const at::Tensor& logits, const at::Tensor& hidden, const at::Tensor& weight,
                         const at::Tensor& targets, const at::Tensor& row_values, double softcap,
                         at::Tensor& hidden_gradient, at::Tensor& weight_gradient) {
  const HeadBlocks problem = problem_of(logits, hidden, weight, targets, softcap);
  TORCH_CHECK(row_values.scalar_type() == at::kFloat && row_values.dim() == 2 && row_values.size(0) == 4 &&
                  row_values.size(1) == problem.rows && row_values.is_contiguous(),
              "row_values must be float32 [4, ", problem.rows, "], contiguous, found ", row_values.scalar_type(), " ",
              row_values.sizes());
  const auto dtype = problem.dtype, sum_dtype = weight_gradient.scalar_type();
  TORCH_CHECK_TYPE(hidden_gradient.scalar_type() == dtype && (sum_dtype == at::kFloat || sum_dtype == dtype),
                   "hidden's gradient must be ", dtype, ", weight's this or float32, found ",
                   hidden_gradient.scalar_type(), " and ", sum_dtype);
  TORCH_CHECK(hidden_gradient.sizes() == hidden.sizes() && hidden_gradient.is_contiguous() &&
                  weight_gradient.sizes() == weight.sizes() && weight_gradient.is_contiguous(),
              "gradients must be contiguous and of the sizes ", hidden.sizes(), " and ", weight.sizes(), ", found ",
              hidden_gradient.sizes(), " and ", weight_gradient.sizes());
  at::native::illada_gradients_in_blocks_stub(at::kCPU, problem, logits.const_data_ptr(),
                                              row_values.const_data_ptr<float>(), hidden_gradient.mutable_data_ptr(),
                                              weight_gradient.mutable_data_ptr(), sum_dtype != at::kFloat);
}

at::Tensor logits_in_blocks_meta(at::Tensor&, const at::Tensor& hidden, const at::Tensor&, const at::Tensor&, double) {
  return at::empty_symint({3, hidden.sym_size(0)}, hidden.options().dtype(at::kFloat));
}

void gradients_in_blocks_meta(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                              const at::Tensor&, double, at::Tensor&, at::Tensor&) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(illada, library) {
  library.def(
      "logits_in_blocks(Tensor(a!) logits, Tensor hidden, Tensor weight, Tensor targets, float softcap) -> Tensor");
  library.def(
      "gradients_in_blocks(Tensor logits, Tensor hidden, Tensor weight, Tensor targets, Tensor row_values, "
      "float softcap, Tensor(a!) hidden_gradient, Tensor(b!) weight_gradient) -> ()");
}

TORCH_LIBRARY_IMPL(illada, CPU, library) {
  library.impl("logits_in_blocks", &logits_in_blocks);
  library.impl("gradients_in_blocks", &gradients_in_blocks);
}

TORCH_LIBRARY_IMPL(illada, Meta, library) {
  library.impl("logits_in_blocks", &logits_in_blocks_meta);
  library.impl("gradients_in_blocks", &gradients_in_blocks_meta);
}

}  // namespace illada
