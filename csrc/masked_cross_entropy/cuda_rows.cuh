// How a block of threads walks over one row of logits: 16 bytes an access where the address allows it, single logits
// elsewhere, and what a visitor is shown on the way. Part of cuda_kernels.cuh, which says why the caches are passed by.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda_kernels.h"

namespace illada {
namespace {

constexpr int kThreads = 512;
constexpr int kLoadsInFlight = 4;
constexpr int kLoadBytes = 16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void round_to(float value, float* rounded) { *rounded = value; }
__device__ __forceinline__ void round_to(float value, __half* rounded) { *rounded = __float2half_rn(value); }
__device__ __forceinline__ void round_to(float value, __nv_bfloat16* rounded) { *rounded = __float2bfloat16_rn(value); }

// Neighbouring logits moved by one instruction: 16 bytes at an address divisible by 16, or a single one.
template <typename T, int kWidth>
struct Run {
  static_assert(kWidth == 1 || kWidth * sizeof(T) == kLoadBytes, "a run is one logit or one 16-byte access");
  T logit[kWidth];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kWidth == 1) {
      logit[0] = *from;
    } else {
      const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from));
      memcpy(logit, &bits, sizeof(bits));
    }
  }

  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kWidth == 1) {
      *to = logit[0];
    } else {
      uint4 bits;
      memcpy(&bits, logit, sizeof(bits));
      __stcg(reinterpret_cast<uint4*>(to), bits);
    }
  }
};

template <typename T>
struct Row {
  T* logits;
  int64_t columns;
  int64_t column_stride;
};

template <typename T, bool kUnitStride>
__device__ __forceinline__ Row<T> row_of(const LogitMatrix& matrix, int64_t row) {
  return {static_cast<T*>(matrix.data) + row * matrix.row_stride, matrix.columns,
          kUnitStride ? 1 : matrix.column_stride};
}

// A visitor is shown values[run][i], the logit of column + run * kThreads * kWidth + i; where it writes, what it leaves
// there is stored. All loads come before the first use, so that they travel together.
template <int kRuns, int kWidth, typename T, typename Visitor>
__device__ __forceinline__ void visit_runs(const Row<T>& row, int64_t column, Visitor& visitor) {
  T* const first = row.logits + column * row.column_stride;
  const int64_t step = kThreads * kWidth * row.column_stride;
  Run<T, kWidth> runs[kRuns];
#pragma unroll
  for (int run = 0; run < kRuns; ++run) runs[run].load(first + run * step);

  float values[kRuns][kWidth];
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[run][i] = to_float(runs[run].logit[i]);
  }
  visitor.visit(values, column);
  if constexpr (Visitor::kWrites) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) round_to(values[run][i], &runs[run].logit[i]);
      runs[run].store(first + run * step);
    }
  }
}

// This thread's share of the columns [begin, end), a multiple of kWidth: kRuns runs at a time, then single ones.
template <int kRuns, int kWidth, typename T, typename Visitor>
__device__ __forceinline__ void visit_columns(const Row<T>& row, int64_t begin, int64_t end, Visitor& visitor) {
  constexpr int64_t kStep = kThreads * kWidth;
  int64_t column = begin + static_cast<int64_t>(threadIdx.x) * kWidth;
  if constexpr (kRuns > 1) {
    for (; column + (kRuns - 1) * kStep < end; column += kRuns * kStep) visit_runs<kRuns, kWidth>(row, column, visitor);
  }
#pragma unroll 1
  for (; column < end; column += kStep) visit_runs<1, kWidth>(row, column, visitor);
}

// This thread's share of a row: 16 bytes at a time, single logits before the first aligned address and after the last.
template <bool kUnitStride, typename T, typename Visitor>
__device__ __forceinline__ void visit_row(const Row<T>& row, Visitor& visitor) {
  if constexpr (kUnitStride) {
    constexpr int kWidth = kLoadBytes / sizeof(T);
    const int beyond = reinterpret_cast<uintptr_t>(row.logits) % kLoadBytes / sizeof(T);
    const int64_t unaligned = (kWidth - beyond) % kWidth;
    const int64_t begin = unaligned < row.columns ? unaligned : row.columns;
    const int64_t end = row.columns - (row.columns - begin) % kWidth;
    visit_columns<1, 1>(row, 0, begin, visitor);
    visit_columns<kLoadsInFlight, kWidth>(row, begin, end, visitor);
    visit_columns<1, 1>(row, end, row.columns, visitor);
  } else {
    visit_columns<kLoadsInFlight, 1>(row, 0, row.columns, visitor);
  }
}

}  // namespace
}  // namespace illada
