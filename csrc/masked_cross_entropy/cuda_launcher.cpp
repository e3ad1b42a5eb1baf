// The two passes for CUDA tensors: torch's side of cuda_kernels.h. Schema and meta functions are in library.cpp.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "cuda_kernels.h"

namespace illada {
namespace {

LogitType logit_type(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kBFloat16:
      return LogitType::kBfloat16;
    case at::kHalf:
      return LogitType::kFloat16;
    default:
      return LogitType::kFloat32;  // check_logits admits no other
  }
}

LogitMatrix logit_matrix(const at::Tensor& logits, void* data) {
  return {data, logit_type(logits), logits.size(0), logits.size(1), logits.stride(0), logits.stride(1)};
}

void check_launch(cudaError_t error, const char* kernel, const at::Tensor& logits) {
  TORCH_CHECK(error == cudaSuccess, "launching ", kernel, " on logits ", logits.sizes(), " of ", logits.scalar_type(),
              " on ", logits.device(), " failed: ", cudaGetErrorString(error));
}

at::Tensor logit_statistics_cuda(const at::Tensor& logits, const at::Tensor& targets, double softcap) {
  check_logits(logits, targets, softcap);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor row_targets = targets.contiguous();
  at::Tensor statistics = at::empty({3, logits.size(0)}, logits.options().dtype(at::kFloat));
  // Only read there: LogitMatrix serves both passes, and a const access leaves a lazily cloned tensor alone
  void* const data = const_cast<void*>(logits.const_data_ptr());
  check_launch(launch_logit_statistics(logit_matrix(logits, data), row_targets.const_data_ptr<int64_t>(),
                                       static_cast<float>(softcap), statistics.mutable_data_ptr<float>(),
                                       c10::cuda::getCurrentCUDAStream()),
               "logit_statistics", logits);
  return statistics;
}

void logits_to_gradient_cuda(at::Tensor& logits, const at::Tensor& targets, const at::Tensor& row_values,
                             double softcap) {
  check_logits(logits, targets, softcap);
  check_row_values(logits, row_values);
  const c10::cuda::CUDAGuard guard(logits.device());
  // Copies die at return: the allocator reuses their memory on this stream only, so after the kernel
  const at::Tensor row_targets = targets.contiguous();
  const at::Tensor values = row_values.contiguous();
  check_launch(launch_logits_to_gradient(logit_matrix(logits, logits.mutable_data_ptr()),
                                         row_targets.const_data_ptr<int64_t>(), values.const_data_ptr<float>(),
                                         static_cast<float>(softcap), c10::cuda::getCurrentCUDAStream()),
               "logits_to_gradient_", logits);
}

}  // namespace

TORCH_LIBRARY_IMPL(illada, CUDA, library) {
  library.impl("logit_statistics", &logit_statistics_cuda);
  library.impl("logits_to_gradient_", &logits_to_gradient_cuda);
}

}  // namespace illada
