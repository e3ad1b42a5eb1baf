// Chooses and launches the kernels of cuda_kernels.cuh; built by nvcc for sm_80 and later, without torch.
#include "cuda_kernels.cuh"

namespace illada {
namespace {

// cudaLaunchKernelEx rather than <<<>>>: it returns the error of this launch, and tests/simt can stand in for it.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_rows(int64_t rows, cudaStream_t stream, void (*kernel)(Parameters...), Arguments... arguments) {
  if (rows > INT32_MAX) return cudaErrorInvalidConfiguration;  // blocks in a grid
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(rows));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename T, bool kUnitStride, bool kCapped>
struct Variant {
  using Logit = T;
  static constexpr bool unit_stride = kUnitStride;
  static constexpr bool capped = kCapped;
};

template <typename T, typename Launch>
cudaError_t with_variant(const LogitMatrix& logits, float softcap, Launch launch) {
  const bool unit_stride = logits.column_stride == 1 || logits.columns <= 1;
  if (softcap > 0) return unit_stride ? launch(Variant<T, true, true>()) : launch(Variant<T, false, true>());
  return unit_stride ? launch(Variant<T, true, false>()) : launch(Variant<T, false, false>());
}

// launch(Variant) with the kernel variant that these logits need.
template <typename Launch>
cudaError_t with_variant(const LogitMatrix& logits, float softcap, Launch launch) {
  switch (logits.type) {
    case LogitType::kBfloat16:
      return with_variant<__nv_bfloat16>(logits, softcap, launch);
    case LogitType::kFloat16:
      return with_variant<__half>(logits, softcap, launch);
    case LogitType::kFloat32:
      return with_variant<float>(logits, softcap, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_logit_statistics(const LogitMatrix& logits, const int64_t* targets, float softcap, float* statistics,
                                    cudaStream_t stream) {
  if (logits.rows == 0) return cudaSuccess;
  return with_variant(logits, softcap, [&](auto variant) {
    using V = decltype(variant);
    return launch_rows(logits.rows, stream, logit_statistics_kernel<typename V::Logit, V::unit_stride, V::capped>,
                       logits, targets, softcap, statistics);
  });
}

cudaError_t launch_logits_to_gradient(const LogitMatrix& logits, const int64_t* targets, const float* row_values,
                                      float softcap, cudaStream_t stream) {
  if (logits.rows == 0 || logits.columns == 0) return cudaSuccess;
  return with_variant(logits, softcap, [&](auto variant) {
    using V = decltype(variant);
    return launch_rows(logits.rows, stream, logits_to_gradient_kernel<typename V::Logit, V::unit_stride, V::capped>,
                       logits, targets, row_values, softcap);
  });
}

}  // namespace illada
