// csrc/masked_cross_entropy/cuda_kernels.cu, unchanged, for harness.py: launches run on the machine of tests/simt.
#include "abi.h"
#include "cuda_kernels.cu"

namespace {

std::string text_of(cudaError_t error) {
  return error == cudaSuccess ? "" : "cudaError " + std::to_string(static_cast<int>(error));
}

}  // namespace

extern "C" {

const char* simt_logit_statistics(const illada::LogitMatrix* logits, const int64_t* targets, float softcap,
                                  float* statistics) {
  return simt::message_of(
      [&] { return text_of(illada::launch_logit_statistics(*logits, targets, softcap, statistics, nullptr)); });
}

const char* simt_logits_to_gradient(const illada::LogitMatrix* logits, const int64_t* targets, const float* row_values,
                                    float softcap) {
  return simt::message_of(
      [&] { return text_of(illada::launch_logits_to_gradient(*logits, targets, row_values, softcap, nullptr)); });
}

}  // extern "C"
