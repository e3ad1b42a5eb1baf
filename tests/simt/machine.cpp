#include "machine.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

// Bounds of the section that holds every __shared__ variable (include/cuda_runtime.h); absent where there is none.
extern "C" char __start_simt_shared[] __attribute__((weak));
extern "C" char __stop_simt_shared[] __attribute__((weak));

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 << 10;

enum class State { kReady, kAtBarrier, kAtShuffle, kReturned };

struct Shuffle {
  unsigned mask;
  uint32_t bits;
  unsigned source_lane;
  uint32_t received;
};

// Entered once through its context; after that _setjmp and _longjmp switch, which save a system call each time.
struct Fiber {
  ucontext_t entry;
  jmp_buf resumed;
  bool entered;
  State state;
  int line;  // of the barrier or shuffle it waits in
  Shuffle shuffle;
};

uint64_t order = 0;

class Block;
Block* running = nullptr;

void* map(size_t bytes) {
  void* const mapping =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  return mapping;
}

// The threads of one block at a time; stacks are kept from block to block.
class Block {
 public:
  Block(unsigned threads, const std::function<void()>& kernel)
      : kernel_(kernel), fibers_(threads), turns_(threads), stacks_(static_cast<char*>(map(threads * kStackBytes))) {
    for (unsigned i = 0; i < threads; ++i) prepare(i);
    std::iota(turns_.begin(), turns_.end(), 0u);
    if (order == 1) std::reverse(turns_.begin(), turns_.end());
    running = this;
  }

  ~Block() {
    running = nullptr;
    munmap(stacks_, fibers_.size() * kStackBytes);
  }

  void run_block() {
    std::fill(__start_simt_shared, __stop_simt_shared, '\xff');  // NaN: what a block has not written means nothing
    if (order > 1) std::shuffle(turns_.begin(), turns_.end(), std::mt19937_64(order + blockIdx.x));
    for (Fiber& fiber : fibers_) fiber.state = State::kReady;
    while (take_turns()) release_barrier();
  }

  // Called in a fiber: lets others run until this one is ready again.
  void wait(State state, int line) {
    fibers_[current_].state = state;
    fibers_[current_].line = line;
    if (state == State::kAtShuffle) complete_shuffle();
    if (_setjmp(fibers_[current_].resumed) == 0) _longjmp(scheduler_, 1);
  }

  // Called in a fiber or in a signal handler on its stack: ends the block, with a Fault for the scheduler's caller.
  [[noreturn]] void fail(const std::string& what) {
    fault_ = what + " (" + name(current_) + " of block " + std::to_string(blockIdx.x) + ")";
    _longjmp(scheduler_, 1);
  }

  Fiber& current() { return fibers_[current_]; }

 private:
  static std::string name(unsigned thread) { return "thread " + std::to_string(thread); }

  void prepare(unsigned thread) {
    Fiber& fiber = fibers_[thread];
    fiber.entered = false;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stacks_ + thread * kStackBytes;
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, &Block::live, 0);
  }

  // A fiber's life: the kernel, once for each block.
  static void live() {
    for (;;) {
      std::string fault;  // told after the handler, which a jump would never leave
      try {
        running->kernel_();
      } catch (const Fault& thrown) {
        fault = thrown.what();
      }
      if (!fault.empty()) running->fail(fault);
      running->wait(State::kReturned, 0);
    }
  }

  // Returns when the current fiber waits or fails. Not inlined: a caller's variables must survive the jump.
  __attribute__((noinline)) void resume(Fiber* fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber->entered) _longjmp(fiber->resumed, 1);
    fiber->entered = true;
    setcontext(&fiber->entry);
  }

  // One turn for each thread that is ready; false once all have returned. No thread ready: they wait for one another.
  bool take_turns() {
    bool ran = false;
    for (const unsigned thread : turns_) {
      if (fibers_[thread].state != State::kReady) continue;
      ran = true;
      current_ = thread;
      threadIdx = dim3(thread, 0, 0);
      resume(&fibers_[thread]);
      if (!fault_.empty()) throw Fault(fault_);
    }
    if (ran) return true;
    if (count(State::kReturned) == fibers_.size()) return false;
    throw Fault(describe_deadlock());
  }

  size_t count(State state) const {
    return std::count_if(fibers_.begin(), fibers_.end(), [&](const Fiber& fiber) { return fiber.state == state; });
  }

  void release_barrier() {
    if (count(State::kAtBarrier) != fibers_.size()) return;
    for (Fiber& fiber : fibers_) {
      if (fiber.line != fibers_[0].line)
        throw Fault("divergent barrier: threads of block " + std::to_string(blockIdx.x) + " wait at line " +
                    std::to_string(fibers_[0].line) + " and at line " + std::to_string(fiber.line));
      fiber.state = State::kReady;
    }
  }

  // Hands out the values of the current fiber's shuffle if it was the last of its lanes to arrive.
  void complete_shuffle() {
    const Fiber& last = fibers_[current_];
    const unsigned first = current_ / kWarpLanes * kWarpLanes;
    const unsigned lanes = std::min<size_t>(kWarpLanes, fibers_.size() - first);
    const unsigned mask = last.shuffle.mask;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (lane >= lanes)
        throw Fault("a shuffle names lane " + std::to_string(lane) + ", which the block does not have");
      const Fiber& fiber = fibers_[first + lane];
      if (fiber.state != State::kAtShuffle || fiber.line != last.line || fiber.shuffle.mask != mask) return;
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& fiber = fibers_[first + lane];
      const unsigned source = fiber.shuffle.source_lane;
      if (!(mask >> source & 1))
        throw Fault("a shuffle reads lane " + std::to_string(source) + ", which takes no part in it");
      fiber.shuffle.received = fibers_[first + source].shuffle.bits;
      fiber.state = State::kReady;
    }
  }

  std::string describe_deadlock() const {
    std::string text = "divergent threads in block " + std::to_string(blockIdx.x) + ": ";
    const auto add = [&](State state, const char* what) {
      const auto first =
          std::find_if(fibers_.begin(), fibers_.end(), [&](const Fiber& fiber) { return fiber.state == state; });
      if (first == fibers_.end()) return;
      text += std::to_string(count(state)) + " " + what + " (first " + name(first - fibers_.begin());
      text += (first->line ? ", line " + std::to_string(first->line) : "") + "); ";
    };
    add(State::kAtBarrier, "wait in __syncthreads");
    add(State::kAtShuffle, "wait in a shuffle for a lane that does not come");
    add(State::kReturned, "have returned");
    return text;
  }

  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> turns_;
  char* stacks_;
  jmp_buf scheduler_;
  unsigned current_ = 0;
  std::string fault_;
};

void on_signal(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL || signal == SIGTRAP) running->fail("undefined behaviour, as the compiler's traps define it");
  char address[32];
  snprintf(address, sizeof(address), "%p", info->si_addr);
  running->fail(std::string("access outside of memory at ") + address);
}

// Turns the signals of bad accesses into faults while a grid runs, and gives them back to the process afterwards.
class SignalGuard {
 public:
  SignalGuard() {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int i = 0; i < kSignals; ++i) sigaction(kNumbers[i], &action, &before_[i]);
  }
  ~SignalGuard() {
    for (int i = 0; i < kSignals; ++i) sigaction(kNumbers[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals = 4;
  static constexpr int kNumbers[kSignals] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[kSignals];
};

}  // namespace

void set_order(uint64_t new_order) { order = new_order; }

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (running != nullptr) throw std::logic_error("a kernel runs already");
  if (grid.x == 0 || block.x == 0 || block.x > 1024)
    throw Fault("invalid launch of " + std::to_string(grid.x) + " blocks of " + std::to_string(block.x) + " threads");
  gridDim = grid;
  blockDim = block;
  const SignalGuard signals;
  Block threads(block.x, kernel);
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = dim3(i, 0, 0);
    threads.run_block();
  }
}

void barrier(int line) { running->wait(State::kAtBarrier, line); }

uint32_t shuffle(unsigned mask, uint32_t bits, Pick pick, int operand, int width, int line) {
  const int lane = threadIdx.x % kWarpLanes;
  const int segment = lane / width * width;
  int source = segment + operand % width;
  if (pick == Pick::kDown) source = lane + operand;
  if (pick == Pick::kXor) source = lane ^ operand;
  if (source >= segment + width) source = lane;  // leaves its segment: every lane keeps its own value
  if (!(mask >> lane & 1)) throw Fault("lane " + std::to_string(lane) + " calls a shuffle that does not name it");
  Fiber& fiber = running->current();
  fiber.shuffle = {mask, bits, static_cast<unsigned>(source), 0};
  running->wait(State::kAtShuffle, line);
  return fiber.shuffle.received;
}

void check_aligned(const void* address, unsigned bytes) {
  const auto off = reinterpret_cast<uintptr_t>(address) % bytes;
  if (off != 0)
    throw Fault("misaligned access of " + std::to_string(bytes) + " bytes, " + std::to_string(off) +
                " after a multiple of them");
}

GuardedMemory::GuardedMemory(size_t bytes, bool guard_after) {
  const size_t page = sysconf(_SC_PAGESIZE);
  const size_t inside = (bytes + page - 1) / page * page;
  mapping_bytes_ = inside + 2 * page;
  mapping_ = map(mapping_bytes_);
  char* const begin = static_cast<char*>(mapping_) + page;
  if (mprotect(mapping_, page, PROT_NONE) != 0 || mprotect(begin + inside, page, PROT_NONE) != 0)
    throw std::bad_alloc();
  data_ = guard_after ? begin + inside - bytes : begin;
}

GuardedMemory::~GuardedMemory() { munmap(mapping_, mapping_bytes_); }

}  // namespace simt
