// What the CUDA kernels of the masked cross-entropy offer to a C++ compiler: cuda_launcher.cpp calls these two
// functions.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace illada {

enum class LogitType { kBfloat16, kFloat16, kFloat32 };

// Logits [rows, columns] of one rank's vocabulary range, on the device. Strides count elements and may have any sign;
// rows must not overlap where they are written.
struct LogitMatrix {
  void* data;
  LogitType type;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

// Fills statistics [3, rows]: of z = softcap * tanh(logit / softcap), or z = logit unless softcap > 0, the row's
// maximum, its sum of exp(z - maximum), and z at the row's target (-inf where targets[row] is outside [0, columns)).
// With no logit above -inf the maximum is -inf and the sum 0. A row with NaN gives NaN, one with +inf gives +inf and
// NaN. Asynchronous on `stream`; with no rows nothing is launched.
cudaError_t launch_logit_statistics(const LogitMatrix& logits, const int64_t* targets, float softcap, float* statistics,
                                    cudaStream_t stream);

// Overwrites the logits with the gradient, scaled by row: with d = (z - maximum) - log_sum,
//   (softmax_scale * exp(d) - [column is the target] * label_scale) * dz/dlogit,
// rounded to nearest even. row_values [4, rows], contiguous: maximum, log_sum, softmax_scale, label_scale.
// Asynchronous on `stream`; without logits nothing is launched.
cudaError_t launch_logits_to_gradient(const LogitMatrix& logits, const int64_t* targets, const float* row_values,
                                      float softcap, cudaStream_t stream);

}  // namespace illada
