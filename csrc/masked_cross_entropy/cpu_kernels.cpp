// The two passes over a chunk of logits on a CPU: rows in parallel, at::vec lanes along a row, all arithmetic in fp32.
//
// Bytes: the statistics read every logit once, the gradient reads and writes it once. A row is taken in blocks that
// stay in the first-level cache, so the statistics' second look at a block (maximum first, then exponentials) is free.

#include "cpu_kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "softcap.h"

namespace illada::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 4096;  // elements: 16 kB of floats
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A vector of T as one (float) or two (bf16, fp16) vectors of floats, and back.
template <typename T>
struct Pack {
  static constexpr int kParts = sizeof(float) / sizeof(T);
  static constexpr int64_t kSize = kParts * kLanes;
  using Parts = std::array<Floats, kParts>;

  static Parts load(const T* from) {
    const auto raw = at::vec::Vectorized<T>::loadu(from);
    if constexpr (kParts == 1) {
      return {raw};
    } else {
      const auto [low, high] = at::vec::convert_to_float<T>(raw);
      return {low, high};
    }
  }

  static void store(const Parts& parts, T* to) {
    if constexpr (kParts == 1) {
      parts[0].store(to);
    } else {
      at::vec::convert_from_float<T>(parts[0], parts[1]).store(to);
    }
  }
};

template <typename T>
Floats exponential(const Floats& x) {
  // 20 ulp are far below bf16's and fp16's own rounding; fp32 gets the accurate one
  if constexpr (std::is_same_v<T, float>) {
    return x.exp();
  } else {
    return x.exp_u20();
  }
}

template <typename T>
bool misfit(int64_t count) {
  return count % Pack<T>::kSize != 0;
}

// A block of a row as contiguous elements, whole vectors of them: in place, or a copy whose rest is -inf.
template <typename T>
class Block {
 public:
  const T* read(const T* from, int64_t stride, int64_t count) {
    if (stride == 1 && !misfit<T>(count)) {
      return from;
    }
    for (int64_t i = 0; i < count; ++i) {
      buffer_[i] = from[i * stride];
    }
    std::fill(buffer_.begin() + count, buffer_.begin() + padded(count), static_cast<T>(-kInfinity));
    return buffer_.data();
  }

  T* target(T* to, int64_t stride, int64_t count) { return stride == 1 && !misfit<T>(count) ? to : buffer_.data(); }

  void write(T* to, int64_t stride, int64_t count) const {
    if (stride == 1 && !misfit<T>(count)) {
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      to[i * stride] = buffer_[i];
    }
  }

  static int64_t padded(int64_t count) { return (count + Pack<T>::kSize - 1) / Pack<T>::kSize * Pack<T>::kSize; }

 private:
  alignas(64) std::array<T, kBlock> buffer_;
};

// z of one vector of elements; those beyond the `left` real ones are -inf, which a softcap would lift to -softcap.
template <typename T, bool kCapped>
typename Pack<T>::Parts load_capped(const T* from, int64_t left, float softcap) {
  auto parts = Pack<T>::load(from);
  if constexpr (kCapped) {
    for (int k = 0; k < Pack<T>::kParts; ++k) {
      parts[k] = capped<kCapped>(parts[k], softcap);
      if (left < Pack<T>::kSize) {
        const int64_t real = std::clamp(left - k * kLanes, int64_t{0}, kLanes);
        parts[k] = Floats::set(Floats(-kInfinity), parts[k], real);
      }
    }
  }
  return parts;
}

template <typename T, bool kCapped>
float block_maximum(const T* block, int64_t count, float softcap) {
  typename Pack<T>::Parts largest;
  largest.fill(Floats(-kInfinity));
  for (int64_t i = 0; i < count; i += Pack<T>::kSize) {
    const auto parts = load_capped<T, kCapped>(block + i, count - i, softcap);
    for (int k = 0; k < Pack<T>::kParts; ++k) {
      largest[k] = at::vec::maximum(largest[k], parts[k]);
    }
  }
  return largest_of(Pack<T>::kParts == 1 ? largest[0] : at::vec::maximum(largest[0], largest[Pack<T>::kParts - 1]));
}

template <typename T, bool kCapped>
float block_exp_sum(const T* block, int64_t count, float maximum, float softcap) {
  typename Pack<T>::Parts sum;
  sum.fill(Floats(0.0f));
  for (int64_t i = 0; i < count; i += Pack<T>::kSize) {
    const auto parts = load_capped<T, kCapped>(block + i, count - i, softcap);
    for (int k = 0; k < Pack<T>::kParts; ++k) {
      sum[k] = sum[k] + exponential<T>(parts[k] - Floats(maximum));
    }
  }
  return sum_of(Pack<T>::kParts == 1 ? sum[0] : sum[0] + sum[Pack<T>::kParts - 1]);
}

// NaN where one of them is
float larger_of(float a, float b) { return std::isnan(a) || a > b ? a : b; }

template <typename T, bool kCapped>
void statistics_of_rows(float* statistics, const at::TensorBase& logits, const int64_t* targets, float softcap) {
  const int64_t rows = logits.size(0), width = logits.size(1), step = logits.stride(1);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Block<T> buffer;
    for (int64_t row = begin; row < end; ++row) {
      const T* logit = static_cast<const T*>(logits.const_data_ptr()) + row * logits.stride(0);
      float maximum = -kInfinity, sum = 0.0f;
      for (int64_t first = 0; first < width; first += kBlock) {
        const int64_t count = std::min(kBlock, width - first);
        const T* block = buffer.read(logit + first * step, step, count);
        const float larger = larger_of(maximum, block_maximum<T, kCapped>(block, count, softcap));
        if (larger == -kInfinity) {
          continue;  // nothing but -inf so far: no exponential of inf - inf
        }
        sum = sum * std::exp(maximum - larger) + block_exp_sum<T, kCapped>(block, count, larger, softcap);
        maximum = larger;
      }
      const int64_t target = targets[row];
      const bool held = target >= 0 && target < width;
      statistics[row] = maximum;
      statistics[rows + row] = sum;
      statistics[2 * rows + row] = held ? capped(static_cast<float>(logit[target * step]), softcap) : -kInfinity;
    }
  });
}

// What the gradient of a row depends on; row_values [4, m] holds them in this order.
struct RowValues {
  float maximum, log_sum, softmax_scale, label_scale;

  RowValues(const float* row_values, int64_t rows, int64_t row)
      : maximum(row_values[row]),
        log_sum(row_values[rows + row]),
        softmax_scale(row_values[2 * rows + row]),
        label_scale(row_values[3 * rows + row]) {}
};

template <typename T, bool kCapped>
void block_gradient(const T* block, T* gradient, int64_t padded, const RowValues& values, float softcap) {
  for (int64_t i = 0; i < padded; i += Pack<T>::kSize) {
    auto parts = Pack<T>::load(block + i);
    for (auto& part : parts) {
      const Floats z = capped<kCapped>(part, softcap);
      part = exponential<T>((z - Floats(values.maximum)) - Floats(values.log_sum)) * Floats(values.softmax_scale);
      if constexpr (kCapped) {
        const Floats ratio = z / Floats(softcap);
        part = part * (Floats(1.0f) - ratio * ratio);
      }
    }
    Pack<T>::store(parts, gradient + i);
  }
}

// a (p - 1) for a = b, without the cancellation where the label's probability p is near 1
float label_gradient(float logit, const RowValues& values, float softcap) {
  const float z = capped(logit, softcap), d = (z - values.maximum) - values.log_sum;
  const float gradient = values.label_scale * std::expm1(d) + (values.softmax_scale - values.label_scale) * std::exp(d);
  const float ratio = softcap > 0 ? z / softcap : 0.0f;
  return gradient * (1.0f - ratio * ratio);
}

template <typename T, bool kCapped>
void gradient_of_rows(const at::TensorBase& logits, const int64_t* targets, const float* row_values, float softcap) {
  const int64_t rows = logits.size(0), width = logits.size(1), step = logits.stride(1);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Block<T> buffer;
    for (int64_t row = begin; row < end; ++row) {
      T* logit = static_cast<T*>(logits.mutable_data_ptr()) + row * logits.stride(0);
      const int64_t target = targets[row];
      const bool held = target >= 0 && target < width;
      const RowValues values(row_values, rows, row);
      const float label_logit = held ? static_cast<float>(logit[target * step]) : 0.0f;
      for (int64_t first = 0; first < width; first += kBlock) {
        const int64_t count = std::min(kBlock, width - first);
        const T* block = buffer.read(logit + first * step, step, count);
        T* gradient = buffer.target(logit + first * step, step, count);
        block_gradient<T, kCapped>(block, gradient, Block<T>::padded(count), values, softcap);
        buffer.write(logit + first * step, step, count);
      }
      if (held) {
        logit[target * step] = static_cast<T>(label_gradient(label_logit, values, softcap));
      }
    }
  });
}

template <typename Function>
void with_type(at::ScalarType dtype, const Function& function) {
  switch (dtype) {  // library.cpp lets no other through
    case at::kBFloat16:
      return function.template operator()<c10::BFloat16>();
    case at::kHalf:
      return function.template operator()<c10::Half>();
    default:
      return function.template operator()<float>();
  }
}

const int64_t* integers(const at::TensorBase& values) { return static_cast<const int64_t*>(values.const_data_ptr()); }

void logit_statistics(const at::TensorBase& statistics, const at::TensorBase& logits, const at::TensorBase& targets,
                      float softcap) {
  with_type(logits.scalar_type(), [&]<typename T>() {
    const auto run = softcap > 0 ? &statistics_of_rows<T, true> : &statistics_of_rows<T, false>;
    run(static_cast<float*>(statistics.mutable_data_ptr()), logits, integers(targets), softcap);
  });
}

void logits_to_gradient(const at::TensorBase& logits, const at::TensorBase& targets, const at::TensorBase& row_values,
                        float softcap) {
  with_type(logits.scalar_type(), [&]<typename T>() {
    const auto run = softcap > 0 ? &gradient_of_rows<T, true> : &gradient_of_rows<T, false>;
    run(logits, integers(targets), static_cast<const float*>(row_values.const_data_ptr()), softcap);
  });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_logit_statistics_stub, &illada::CPU_CAPABILITY::logit_statistics)
ALSO_REGISTER_AVX512_DISPATCH(illada_logits_to_gradient_stub, &illada::CPU_CAPABILITY::logits_to_gradient)

}  // namespace at::native
