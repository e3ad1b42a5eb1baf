// A CUDA device's thread model on a CPU: it runs the source of a kernel to prove its logic where there is no GPU.
//
// Blocks run one after another. A block's threads are fibers of one host thread, taken in turn until each waits at a
// barrier, waits in a shuffle or has returned; which order they are taken in is chosen by set_order. A Fault is thrown
// for what a device would leave undefined: a barrier that not all threads reach, a shuffle without one of its lanes, a
// misaligned vector access, an access outside guarded memory (GuardedMemory), or what the compiler's
// undefined-behaviour traps find. It proves neither speed nor memory ordering: fibers never run at the same time,
// caches do not exist, and arithmetic is the host's (its expf, its contraction of products and sums), not the device's.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace simt {

constexpr unsigned kWarpLanes = 32;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// 0: threads in order of their index; 1: the last first; anything else: the seed of an order drawn for each block.
// A kernel whose result depends on it lacks a barrier.
void set_order(uint64_t order);

// Runs kernel() for every thread of the grid (one-dimensional grids and blocks). Throws Fault.
void run(dim3 grid, dim3 block, const std::function<void()>& kernel);

// __syncthreads(), called at source line `line`.
void barrier(int line);

enum class Pick { kIndex, kDown, kXor };

// A warp shuffle of 32 bits within segments of `width` lanes, called at source line `line`.
uint32_t shuffle(unsigned mask, uint32_t bits, Pick pick, int operand, int width, int line);

// Throws Fault unless the address is a multiple of `bytes`.
void check_aligned(const void* address, unsigned bytes);

// Memory with an inaccessible page right before or right after it: an access that leaves it on that side is a Fault.
class GuardedMemory {
 public:
  GuardedMemory(size_t bytes, bool guard_after);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* mapping_;
  size_t mapping_bytes_;
  void* data_;
};

}  // namespace simt
