// The part of CUDA C++ that this project's kernels use, over the machine of tests/simt: found instead of the toolkit's
// header, it lets g++ compile a .cu file unchanged.
#pragma once

#include <math.h>

#include <cstring>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One copy serves all blocks, since they run one after another; machine.cpp fills the section with NaN before each.
#define __shared__ static __attribute__((section("simt_shared")))

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
T __ldcg(const T* address) {
  simt::check_aligned(address, sizeof(T));
  return *address;
}

template <typename T>
void __stcg(T* address, const T& value) {
  simt::check_aligned(address, sizeof(T));
  *address = value;
}

inline void __syncthreads(int line = __builtin_LINE()) { simt::barrier(line); }

namespace simt {

template <typename T>
T shuffle_value(unsigned mask, T value, Pick pick, int operand, int width, int line) {
  static_assert(sizeof(T) == sizeof(uint32_t), "shuffles move 32 bits");
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = shuffle(mask, bits, pick, operand, width, line);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
  return simt::shuffle_value(mask, value, simt::Pick::kIndex, lane, width, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  return simt::shuffle_value(mask, value, simt::Pick::kDown, static_cast<int>(delta), width, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
  return simt::shuffle_value(mask, value, simt::Pick::kXor, lane_mask, width, line);
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  simt::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
