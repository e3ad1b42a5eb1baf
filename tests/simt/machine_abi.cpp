// The machine itself, for harness.py: guarded memory, the order of threads, and kernels that are wrong on purpose, to
// see that each wrong is found.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <limits>

#include "abi.h"

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

__global__ void some_return_before_the_barrier() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

__global__ void two_barriers_at_once() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lanes_missing_from_a_shuffle(int* out) {
  if (threadIdx.x % 32 < 16) *out = __shfl_down_sync(kAllLanes, 1, 8);
}

__global__ void shuffle_from_a_lane_outside_its_mask(int* out) {
  if (threadIdx.x % 32 < 16) *out = __shfl_down_sync(0xffffu, 1, 8);
}

__global__ void misaligned_vector(const char* address) { __ldcg(reinterpret_cast<const uint4*>(address + 2)); }

__global__ void read_at(const volatile char* address) { (void)*address; }

__global__ void overflow(volatile int* value) { *value = std::numeric_limits<int>::max() - *value; }

__global__ void no_barrier_before_the_read(float* out) {
  __shared__ float value;
  if (threadIdx.x == 63) value = 1.0f;
  if (threadIdx.x == 0) *out = value;
}

// Every lane's own number, as each kind of shuffle brings it; a block of 64.
__global__ void shuffles(int* out) {
  const int lane = threadIdx.x % 32;
  int* const mine = out + 4 * threadIdx.x;
  mine[0] = __shfl_down_sync(kAllLanes, lane, 3);
  mine[1] = __shfl_xor_sync(kAllLanes, lane, 5);
  mine[2] = __shfl_sync(kAllLanes, lane, 7);
  mine[3] = __shfl_down_sync(kAllLanes, lane, 3, 8);
}

}  // namespace

extern "C" {

void* simt_memory(size_t bytes, bool guard_after) { return new simt::GuardedMemory(bytes, guard_after); }
void* simt_memory_data(const void* memory) { return static_cast<const simt::GuardedMemory*>(memory)->data(); }
void simt_memory_free(void* memory) { delete static_cast<simt::GuardedMemory*>(memory); }
void simt_set_order(uint64_t order) { simt::set_order(order); }

// Runs the kernel of that name; `memory` is what it is given.
const char* simt_example(const char* name, void* memory) {
  return simt::message_of([&]() -> std::string {
    const std::string wanted = name;
    const auto run = [&](const char* candidate, auto kernel) {
      if (wanted == candidate) simt::run(dim3(1), dim3(64), kernel);
      return wanted == candidate;
    };
    auto* const ints = static_cast<int*>(memory);
    const bool found =
        run("some_return_before_the_barrier", some_return_before_the_barrier) ||
        run("two_barriers_at_once", two_barriers_at_once) ||
        run("lanes_missing_from_a_shuffle", [&] { lanes_missing_from_a_shuffle(ints); }) ||
        run("shuffle_from_a_lane_outside_its_mask", [&] { shuffle_from_a_lane_outside_its_mask(ints); }) ||
        run("misaligned_vector", [&] { misaligned_vector(static_cast<const char*>(memory)); }) ||
        run("read_at", [&] { read_at(static_cast<const char*>(memory)); }) ||
        run("overflow", [&] { overflow(ints); }) ||
        run("no_barrier_before_the_read", [&] { no_barrier_before_the_read(static_cast<float*>(memory)); }) ||
        run("shuffles", [&] { shuffles(ints); });
    return found ? "" : "no example is named " + wanted;
  });
}

const char* simt_to_bfloat16(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __float2bfloat16_rn(from[i]).bits;
  return nullptr;
}

const char* simt_to_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __float2half_rn(from[i]).bits;
  return nullptr;
}

const char* simt_from_half(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = __half2float(__half{from[i]});
  return nullptr;
}

}  // extern "C"
