// Kernels of the masked cross-entropy for NVIDIA GPUs (sm_80 and later). No torch: nvcc alone compiles them, and
// tests/simt runs this very source on a CPU. One block works on one row, in two passes of m rows by v columns of b
// bytes:
//
//                               reads    writes    1,024 x 155,136 bf16    at an H100's 3.35 TB/s
//   logit_statistics_kernel     m v b    12 m      318 MB                   95 us
//   logits_to_gradient_kernel   m v b    m v b     635 MB                  190 us
//
// These times are the floor as long as the instructions fit under them: 132 SMs at 1.76 GHz issue 18 instructions of a
// thread for each bf16 logit that HBM delivers, and docs/masked_loss.md counts what the compiler made of these loops.
// To keep HBM busy an SM needs 25 kB on the way (1 us of latency under load); two blocks, each thread with four loads
// of 16 bytes, are 64 kB.
//
// Cache: a logit is used by one thread of one SM, so loads and stores pass the L1 by (ld.cg, st.cg). None is marked
// evict-first: the gradient overwrites the lines it read, and the matrix products that follow read those. The second
// pass goes from the last row to the first: of a matrix larger than the L2 (50 MB) the last rows are still there.
//
// expf, not exp2f of a product with log2(e): the product's rounding grows with |d| (3e-7 at d = -10, against 1e-7 of
// expf), more than a plain fp32 evaluation errs. Every order of summation is fixed: equal inputs at
// equal alignment give equal bits.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda_kernels.h"
#include "cuda_rows.cuh"

namespace illada {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kBlocksPerSm = 2;  // 64 registers a thread

struct CappedLogit {
  float z;
  float slope;  // dz / dlogit
};

// z = softcap * tanh(logit / softcap), Gemma 2 (arXiv 2408.00118, section 2).
template <bool kCapped>
struct Cap {
  float softcap;
  float inverse;

  __device__ __forceinline__ explicit Cap(float softcap) : softcap(softcap), inverse(1.0f / softcap) {}

  __device__ __forceinline__ CappedLogit operator()(float logit) const {
    if constexpr (kCapped) {
      // The product and a correction by its remainder round as a division does, for a third of its instructions
      const float product = logit * inverse;
      const float quotient = fmaf(fmaf(-product, softcap, logit), inverse, product);
      const float tangent = tanhf(fabsf(product) < INFINITY ? quotient : product);
      return {softcap * tangent, fmaf(-tangent, tangent, 1.0f)};
    } else {
      return {logit, 1.0f};
    }
  }
};

// The softmax's maximum and sum of exp(z - maximum) of the columns seen so far. The sum carries NaN, fmaxf drops it.
struct Partial {
  float maximum;
  float sum;

  // Terms are taken relative to this; -inf - -inf would be NaN
  __device__ __forceinline__ static float reference_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

  __device__ __forceinline__ void merge(const Partial& other) {
    const float largest = fmaxf(maximum, other.maximum);
    const float reference = reference_of(largest);
    sum = sum * expf(maximum - reference) + other.sum * expf(other.maximum - reference);
    maximum = largest;
  }

  // Lane 0 gets the merge of `kLanes` lanes, in a fixed order.
  template <int kLanes>
  __device__ __forceinline__ void merge_lanes() {
    constexpr unsigned kAllLanes = 0xffffffffu;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const Partial other{__shfl_down_sync(kAllLanes, maximum, distance), __shfl_down_sync(kAllLanes, sum, distance)};
      merge(other);
    }
  }
};

// Online softmax (Milakov and Gimelshein, arXiv 1805.02867), one rescaling for all the runs of a visit.
template <bool kCapped>
struct StatisticsVisitor {
  static constexpr bool kWrites = false;
  Cap<kCapped> cap;
  Partial partial;

  template <int kRuns, int kWidth>
  __device__ __forceinline__ void visit(float (&values)[kRuns][kWidth], int64_t) {
    Partial seen{partial.maximum, 0.0f};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[run][i] = cap(values[run][i]).z;
        seen.maximum = fmaxf(seen.maximum, values[run][i]);
      }
    }
    const float reference = Partial::reference_of(seen.maximum);
    // A sum for each run: less rounding than one long sum, and shorter chains of additions that wait for one another
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      float of_run = 0.0f;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) of_run += expf(values[run][i] - reference);
      seen.sum += of_run;
    }
    seen.sum += partial.sum * expf(partial.maximum - reference);
    partial = seen;
  }
};

// Thread 0 gets the merge of the block's partials. Once a kernel: shared memory is written once.
__device__ __forceinline__ void merge_block(Partial* partial) {
  constexpr int kWarps = kThreads / kWarpLanes;
  static_assert(kWarps <= kWarpLanes && kThreads % kWarpLanes == 0, "one warp merges the block's warps");
  __shared__ float maxima[kWarps];
  __shared__ float sums[kWarps];
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;

  partial->merge_lanes<kWarpLanes>();
  if (lane == 0) {
    maxima[warp] = partial->maximum;
    sums[warp] = partial->sum;
  }
  __syncthreads();
  if (warp > 0) return;
  *partial = lane < kWarps ? Partial{maxima[lane], sums[lane]} : Partial{-INFINITY, 0.0f};
  partial->merge_lanes<kWarps>();
}

template <typename T, bool kUnitStride, bool kCapped>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    logit_statistics_kernel(LogitMatrix matrix, const int64_t* __restrict__ targets, float softcap,
                            float* __restrict__ statistics) {
  const int64_t index = blockIdx.x;
  const Row<T> row = row_of<T, kUnitStride>(matrix, index);
  StatisticsVisitor<kCapped> visitor{Cap<kCapped>(softcap), Partial{-INFINITY, 0.0f}};

  float label_z = -INFINITY;
  if (threadIdx.x == 0) {  // before the walk, which hides the latency of two dependent loads
    const int64_t target = targets[index];
    if (0 <= target && target < row.columns) label_z = visitor.cap(to_float(row.logits[target * row.column_stride])).z;
  }
  visit_row<kUnitStride>(row, visitor);
  merge_block(&visitor.partial);

  if (threadIdx.x == 0) {
    const Partial total = visitor.partial;
    // fmaxf passed over NaN, the sum did not; a sum that only +inf spoiled keeps its maximum
    statistics[index] = isnan(total.sum) && total.maximum < INFINITY ? total.sum : total.maximum;
    statistics[matrix.rows + index] = total.sum;
    statistics[2 * matrix.rows + index] = label_z;
  }
}

template <bool kCapped>
struct GradientVisitor {
  static constexpr bool kWrites = true;
  Cap<kCapped> cap;
  int64_t target;  // -1: another rank's
  float maximum;
  float log_sum;
  float softmax_scale;
  float label_scale;

  // Of the softmax. The maximum first: z - maximum is exact where it matters, z - log(normalizer) is rounded at z's
  // size
  __device__ __forceinline__ float log_probability(float z) const { return (z - maximum) - log_sum; }

  __device__ __forceinline__ float elsewhere(float logit) const {
    const CappedLogit capped = cap(logit);
    return softmax_scale * expf(log_probability(capped.z)) * capped.slope;
  }

  // softmax_scale * exp(d) - label_scale without its cancellation where the label's probability is near 1
  __device__ __forceinline__ float at_target(float logit) const {
    const CappedLogit capped = cap(logit);
    const float d = log_probability(capped.z);
    return (label_scale * expm1f(d) + (softmax_scale - label_scale) * expf(d)) * capped.slope;
  }

  // `values` stays in registers only while every index is a constant after unrolling: hence the searches for `held`.
  template <int kRuns, int kWidth>
  __device__ __forceinline__ void visit(float (&values)[kRuns][kWidth], int64_t column) const {
    int held = -1;  // where the target is among these values
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int64_t i = target - column - run * kThreads * kWidth;
      if (0 <= i && i < kWidth) held = run * kWidth + static_cast<int>(i);
    }
    float label_gradient = 0.0f;
    if (held >= 0) {
      float logit = 0.0f;
#pragma unroll
      for (int i = 0; i < kRuns * kWidth; ++i)
        if (i == held) logit = values[i / kWidth][i % kWidth];
      label_gradient = at_target(logit);
    }
#pragma unroll
    for (int i = 0; i < kRuns * kWidth; ++i) values[i / kWidth][i % kWidth] = elsewhere(values[i / kWidth][i % kWidth]);
    if (held >= 0) {
#pragma unroll
      for (int i = 0; i < kRuns * kWidth; ++i)
        if (i == held) values[i / kWidth][i % kWidth] = label_gradient;
    }
  }
};

template <typename T, bool kUnitStride, bool kCapped>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    logits_to_gradient_kernel(LogitMatrix matrix, const int64_t* __restrict__ targets,
                              const float* __restrict__ row_values, float softcap) {
  const int64_t index = matrix.rows - 1 - blockIdx.x;
  const Row<T> row = row_of<T, kUnitStride>(matrix, index);
  const int64_t target = targets[index];
  const bool held = 0 <= target && target < row.columns;
  const float* const values = row_values + index;
  GradientVisitor<kCapped> visitor{Cap<kCapped>(softcap), held ? target : -1,      values[0],
                                   values[matrix.rows],   values[2 * matrix.rows], values[3 * matrix.rows]};
  visit_row<kUnitStride>(row, visitor);
}

}  // namespace
}  // namespace illada
