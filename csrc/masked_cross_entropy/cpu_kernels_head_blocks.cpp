// The two sweeps: each thread walks over its own rows of the head, a block at a time, and whatever is made of a block
// stays in its second-level cache between oneDNN's products (one thread each) and the passes between them.
//
// Bytes a chunk of m rows, with e bytes an element: the first sweep reads the head (v h e) and writes the logits
// (v m e), the second reads both and adds to the weight's gradient (8 v h). Nothing else leaves the caches; a gradient
// of hidden [m, h] in float a thread is added up at the end. The same number of threads gives the same bits.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../cpu/packing.h"
#include "head_blocks.h"
#include "softcap.h"

namespace illada::CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 64;       // rows of the head whose logits, and whose gradients, exist in float
constexpr int64_t kSlab = 256;      // rows of the head whose logits' gradients exist
constexpr int64_t kPadStride = 16;  // beside a tile's rows: a power of two would put them all into a few cache sets
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

// [from, to) of `count` blocks, the same for the same number of threads.
struct Part {
  int64_t number, from, to;
};

template <typename Function>
void for_parts(int64_t count, int64_t parts, const Function& function) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      function(Part{part, count * part / parts, count * (part + 1) / parts});
    }
  });
}

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

int64_t parts_of(int64_t count) { return std::min<int64_t>(at::get_num_threads(), count); }

// Rows [count, width] and zeros below them, `total` in all.
template <typename T>
Scratch<T> with_zeros(const T* rows, int64_t count, int64_t total, int64_t width) {
  Scratch<T> copy(total * width);
  std::copy_n(rows, count * width, copy.get());
  std::fill(copy + count * width, copy + total * width, T(0.0f));
  return copy;
}

// The running maxima and sums of all lanes take in a tile of logits [count, lanes], which is stored rounded to T.
template <typename T, bool kCapped>
void absorb(const float* tile, int64_t stride, int64_t count, int64_t lanes, float softcap, T* logits, float* maxima,
            float* sums) {
  for (int64_t lane = 0; lane < lanes; lane += kStep) {
    Floats largest[2] = {Floats(-kInfinity), Floats(-kInfinity)};
    for (int64_t row = 0; row < count; ++row) {
      const auto [low, high] = load_two(tile + row * stride + lane);
      largest[0] = at::vec::maximum(largest[0], low);
      largest[1] = at::vec::maximum(largest[1], high);
      if constexpr (!std::is_same_v<T, float>) store_two(logits + row * lanes + lane, low, high);
    }
    T rounded[kStep];  // keeps the order, so that this is the largest of the rounded ones
    store_two(rounded, largest[0], largest[1]);
    std::tie(largest[0], largest[1]) = load_two(rounded);
    Floats shift[2], sum[2];
    for (int half = 0; half < 2; ++half) {
      float* maximum = maxima + lane + half * kLanes;
      const Floats before = Floats::loadu(maximum);
      const Floats now = at::vec::maximum(before, capped<kCapped>(largest[half], softcap));
      now.store(maximum);
      // nothing but -inf so far: no exponential of inf - inf
      shift[half] = Floats::blendv(now, Floats(0.0f), now == Floats(-kInfinity));
      sum[half] = Floats::loadu(sums + lane + half * kLanes) * (before - shift[half]).exp();
    }
    for (int64_t row = 0; row < count; ++row) {
      const auto [low, high] = load_two(logits + row * lanes + lane);
      sum[0] = sum[0] + exp2((capped<kCapped>(low, softcap) - shift[0]) * Floats(kLog2E));
      sum[1] = sum[1] + exp2((capped<kCapped>(high, softcap) - shift[1]) * Floats(kLog2E));
    }
    for (int half = 0; half < 2; ++half) sum[half].store(sums + lane + half * kLanes);
  }
}

// Statistics [3, lanes] of parts -> those of all ids, [3, rows].
void combine(const float* parts, int64_t count, int64_t lanes, int64_t rows, float* statistics) {
  for (int64_t row = 0; row < rows; ++row) {
    float maximum = -kInfinity, sum = 0.0f, label = -kInfinity;
    for (int64_t part = 0; part < count; ++part) {
      const float* found = parts + part * 3 * lanes + row;
      maximum = std::isnan(maximum) || maximum > found[0] ? maximum : found[0];
      label = std::isnan(label) || label > found[2 * lanes] ? label : found[2 * lanes];
    }
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    for (int64_t part = 0; part < count; ++part) {
      const float* found = parts + part * 3 * lanes + row;
      sum += found[lanes] * std::exp(found[0] - shift);
    }
    statistics[row] = maximum;
    statistics[rows + row] = sum;
    statistics[2 * rows + row] = label;
  }
}

template <typename T, bool kCapped>
void logits_of(const HeadBlocks& problem, T* logits, float* statistics) {
  const auto* weight = static_cast<const T*>(problem.weight);
  const int64_t rows = problem.rows, lanes = problem.lanes, width = problem.width;
  const Scratch<T> hidden = with_zeros(static_cast<const T*>(problem.hidden), rows, lanes, width);
  const Scratch<T> operand(width * lanes);
  pack_transposed(hidden.get(), lanes, width, operand.get());
  const int64_t count = blocks(problem.ids, kTile), parts = parts_of(count), stride = lanes + kPadStride;
  const Scratch<float> found(parts * 3 * lanes);
  for_parts(count, parts, [&](const Part& part) {
    float *maxima = found + part.number * 3 * lanes, *sums = maxima + lanes, *labels = sums + lanes;
    std::fill_n(maxima, lanes, -kInfinity);
    std::fill_n(sums, lanes, 0.0f);
    std::fill_n(labels, lanes, -kInfinity);
    const Scratch<float> memory(kTile * stride);
    for (int64_t block = part.from; block < part.to; ++block) {
      const int64_t first = block * kTile, height = std::min(kTile, problem.ids - first);
      T* out = logits + first * lanes;
      if constexpr (std::is_same_v<T, float>) {
        multiply(height, lanes, width, weight + first * width, width, operand.get(), out, lanes, false);
        absorb<T, kCapped>(out, lanes, height, lanes, problem.softcap, out, maxima, sums);
      } else {
        multiply(height, lanes, width, weight + first * width, width, operand.get(), memory.get(), stride, false);
        absorb<T, kCapped>(memory.get(), stride, height, lanes, problem.softcap, out, maxima, sums);
      }
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t id = problem.targets[row] - first;
        if (id >= 0 && id < height) labels[row] = capped(static_cast<float>(out[id * lanes + row]), problem.softcap);
      }
    }
    at::native::cpublas::brgemm_release(kPair<T> == 2);
  });
  combine(found.get(), parts, lanes, rows, statistics);
}

// What the gradient of a lane depends on, [lanes] each; zero where there is no row.
struct LaneValues {
  LaneValues(const HeadBlocks& problem, const float* row_values) : lanes_(problem.lanes), memory_(4 * problem.lanes) {
    std::fill_n(memory_.get(), 4 * lanes_, 0.0f);
    for (int64_t i = 0; i < 4; ++i) std::copy_n(row_values + i * problem.rows, problem.rows, memory_ + i * lanes_);
  }
  const float* maximum() const { return memory_.get(); }
  const float* log_sum() const { return memory_ + lanes_; }
  const float* softmax_scale() const { return memory_ + 2 * lanes_; }
  const float* label_scale() const { return memory_ + 3 * lanes_; }

 private:
  int64_t lanes_;
  Scratch<float> memory_;
};

template <bool kCapped>
Floats gradient_of(const Floats& logit, const LaneValues& values, int64_t lane, float softcap) {
  const Floats z = capped<kCapped>(logit, softcap);
  const Floats log_p = (z - Floats::loadu(values.maximum() + lane)) - Floats::loadu(values.log_sum() + lane);
  Floats gradient = exp2(log_p * Floats(kLog2E)) * Floats::loadu(values.softmax_scale() + lane);
  if constexpr (kCapped) {
    const Floats ratio = z / Floats(softcap);
    gradient = gradient * (Floats(1.0f) - ratio * ratio);
  }
  return gradient;
}

// a p - b, without the cancellation where the label's probability p is near 1
float label_gradient(float logit, const LaneValues& values, int64_t lane, float softcap) {
  const float z = capped(logit, softcap), log_p = (z - values.maximum()[lane]) - values.log_sum()[lane];
  const float a = values.softmax_scale()[lane], b = values.label_scale()[lane], ratio = softcap > 0 ? z / softcap : 0;
  return (b * std::expm1(log_p) + (a - b) * std::exp(log_p)) * (1.0f - ratio * ratio);
}

// Gradients [height, lanes] of the logits of the ids from `first` on.
template <typename T, bool kCapped>
void slab_gradient(const HeadBlocks& problem, const T* logits, const LaneValues& values, int64_t first, int64_t height,
                   T* gradient) {
  const int64_t lanes = problem.lanes;
  for (int64_t row = 0; row < height; ++row) {
    for (int64_t lane = 0; lane < lanes; lane += kStep) {
      const auto [low, high] = load_two(logits + row * lanes + lane);
      store_two(gradient + row * lanes + lane, gradient_of<kCapped>(low, values, lane, problem.softcap),
                gradient_of<kCapped>(high, values, lane + kLanes, problem.softcap));
    }
  }
  for (int64_t lane = 0; lane < problem.rows; ++lane) {
    const int64_t id = problem.targets[lane] - first;
    if (id < 0 || id >= height) continue;
    const auto logit = static_cast<float>(logits[id * lanes + lane]);
    gradient[id * lanes + lane] = static_cast<T>(label_gradient(logit, values, lane, problem.softcap));
  }
}

// sum [height, width] += gradient [height, lanes] operand [lanes, width], rounded once where the sum is in T. The
// product goes to memory [kTile, width] first: adding by itself to rows that are in no cache, it waits for them.
template <typename T, typename Sum>
void add_weight_gradient(const T* gradient, int64_t height, int64_t lanes, const T* operand, int64_t width, Sum* sum,
                         float* memory) {
  for (int64_t row = 0; row < height; row += kTile) {
    const int64_t count = std::min(kTile, height - row);
    multiply(count, width, lanes, gradient + row * lanes, lanes, operand, memory, width, false);
    Sum* to = sum + row * width;
    for_steps(count * width, [&](int64_t i, int64_t n) {
      const auto [low, high] = load_two(to + i, n);
      const auto [more_low, more_high] = load_two(memory + i, n);
      store_two(to + i, low + more_low, high + more_high, n);
    });
  }
}

// Sums of [parts, lanes, width] over the parts -> [rows, width] in T
template <typename T>
void add_parts(const float* parts, int64_t count, const HeadBlocks& problem, T* total) {
  const int64_t size = problem.lanes * problem.width;
  at::parallel_for(0, problem.rows, 8, [&](int64_t begin, int64_t end) {
    for_steps((end - begin) * problem.width, [&](int64_t i, int64_t n) {
      const int64_t at = begin * problem.width + i;
      auto [low, high] = load_two(parts + at, n);
      for (int64_t part = 1; part < count; ++part) {
        const auto [more_low, more_high] = load_two(parts + part * size + at, n);
        low = low + more_low;
        high = high + more_high;
      }
      store_two(total + at, low, high, n);
    });
  });
}

template <typename T, bool kCapped, typename Sum>
void gradients_of(const HeadBlocks& problem, const T* logits, const float* row_values, T* hidden_gradient,
                  Sum* weight_gradient) {
  const auto* weight = static_cast<const T*>(problem.weight);
  const int64_t lanes = problem.lanes, width = problem.width;
  const Scratch<T> hidden = with_zeros(static_cast<const T*>(problem.hidden), problem.rows, lanes, width);
  const Scratch<T> operand(lanes * width);
  pack_rows(hidden.get(), lanes, width, operand.get());
  const LaneValues values(problem, row_values);
  const int64_t count = blocks(problem.ids, kSlab), parts = parts_of(count);
  if (parts == 0) {  // all of this rank's rows are padding
    std::fill_n(hidden_gradient, problem.rows * width, T(0.0f));
    return;
  }
  const Scratch<float> sums(parts * lanes * width);
  for_parts(count, parts, [&](const Part& part) {
    const Scratch<T> gradient(kSlab * lanes), transposed(kSlab * lanes), factor(kSlab * width);
    const Scratch<float> memory(kTile * width);
    for (int64_t block = part.from; block < part.to; ++block) {
      const int64_t first = block * kSlab, height = std::min(kSlab, problem.ids - first), full = padded(height);
      const T* slab = weight + first * width;
      slab_gradient<T, kCapped>(problem, logits + first * lanes, values, first, height, gradient.get());
      add_weight_gradient(gradient.get(), height, lanes, operand.get(), width, weight_gradient + first * width,
                          memory.get());
      std::fill(gradient + height * lanes, gradient + full * lanes, T(0.0f));
      transpose(gradient.get(), lanes, full, lanes, transposed.get(), kSlab);
      if (height < full) {
        pack_rows(with_zeros(slab, height, full, width).get(), full, width, factor.get());
      } else if constexpr (kPair<T> == 2) {
        pack_rows(slab, height, width, factor.get());
      }
      const T* right = kPair<T> == 1 && height == full ? slab : factor.get();
      multiply(lanes, width, full, transposed.get(), kSlab, right, sums + part.number * lanes * width, width,
               block > part.from);
    }
    at::native::cpublas::brgemm_release(kPair<T> == 2);
  });
  add_parts(sums.get(), parts, problem, hidden_gradient);
}

template <typename Function>
void with_types(const HeadBlocks& problem, const Function& function) {
  const auto of_type = [&]<typename T>() {
    problem.softcap > 0 ? function.template operator()<T, true>() : function.template operator()<T, false>();
  };
  problem.dtype == at::kFloat ? of_type.template operator()<float>() : of_type.template operator()<at::BFloat16>();
}

void logits_in_blocks(const HeadBlocks& problem, void* logits, float* statistics) {
  with_types(problem,
             [&]<typename T, bool kCapped>() { logits_of<T, kCapped>(problem, static_cast<T*>(logits), statistics); });
}

void gradients_in_blocks(const HeadBlocks& problem, const void* logits, const float* row_values, void* hidden_gradient,
                         void* weight_gradient, bool rounded) {
  with_types(problem, [&]<typename T, bool kCapped>() {
    const auto* from = static_cast<const T*>(logits);
    auto* to = static_cast<T*>(hidden_gradient);
    if (rounded) {
      gradients_of<T, kCapped>(problem, from, row_values, to, static_cast<T*>(weight_gradient));
    } else {
      gradients_of<T, kCapped>(problem, from, row_values, to, static_cast<float*>(weight_gradient));
    }
  });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_logits_in_blocks_stub, &illada::CPU_CAPABILITY::logits_in_blocks)
ALSO_REGISTER_AVX512_DISPATCH(illada_gradients_in_blocks_stub, &illada::CPU_CAPABILITY::gradients_in_blocks)

}  // namespace at::native
