// RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps) over a row (arXiv 1910.07467, eq. 4). A row is read
// from memory once: its second reading finds it in the cache.

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "../cpu/vectors.h"
#include "cpu_kernels.h"

namespace illada::CPU_CAPABILITY {
namespace {

// Rows whose share of the weight's gradient is summed apart: the order of the sum does not depend on the threads.
constexpr int64_t kRows = 64;

template <typename T>
void forward(const RmsNormShape& shape, float eps, const T* x, const T* weight, T* y, float* rstd) {
  const int64_t hidden = shape.hidden;
  at::parallel_for(0, shape.rows, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + row * hidden;
      Floats squares0(0.0f), squares1(0.0f);
      for_steps(hidden, [&](int64_t i, int64_t count) {
        const auto [a, b] = load_two(from + i, count);
        squares0 = at::vec::fmadd(a, a, squares0);
        squares1 = at::vec::fmadd(b, b, squares1);
      });
      const float factor = 1.0f / std::sqrt(sum_of(squares0 + squares1) / static_cast<float>(hidden) + eps);
      rstd[row] = factor;
      const Floats factors(factor);
      for_steps(hidden, [&](int64_t i, int64_t count) {
        const auto [a, b] = load_two(from + i, count);
        const auto [w0, w1] = load_two(weight + i, count);
        store_two(y + row * hidden + i, a * factors * w0, b * factors * w1, count);
      });
    }
  });
}

// grad_x of one row; adds dy * x * rstd to `sums` [hidden].
template <typename T>
void backward_row(int64_t hidden, float rstd, const T* grad, const T* x, const T* weight, T* grad_x, float* sums) {
  Floats products0(0.0f), products1(0.0f);
  const Floats factors(rstd);
  for_steps(hidden, [&](int64_t i, int64_t count) {
    const auto [g0, g1] = load_two(grad + i, count);
    const auto [a, b] = load_two(x + i, count);
    const auto [w0, w1] = load_two(weight + i, count);
    const auto [s0, s1] = load_two(sums + i, count);
    products0 = at::vec::fmadd(g0 * w0, a, products0);
    products1 = at::vec::fmadd(g1 * w1, b, products1);
    store_two(sums + i, at::vec::fmadd(g0, a * factors, s0), at::vec::fmadd(g1, b * factors, s1), count);
  });
  const Floats shares(sum_of(products0 + products1) * rstd * rstd / static_cast<float>(hidden));
  for_steps(hidden, [&](int64_t i, int64_t count) {
    const auto [g0, g1] = load_two(grad + i, count);
    const auto [a, b] = load_two(x + i, count);
    const auto [w0, w1] = load_two(weight + i, count);
    store_two(grad_x + i, (g0 * w0 - a * shares) * factors, (g1 * w1 - b * shares) * factors, count);
  });
}

template <typename T>
void backward(const RmsNormShape& shape, const T* grad, const T* x, const T* weight, const float* rstd, T* grad_x,
              T* grad_weight) {
  const int64_t hidden = shape.hidden, blocks = (shape.rows + kRows - 1) / kRows;
  std::vector<float> sums(blocks * hidden, 0.0f);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kRows; row < std::min(end * kRows, shape.rows); ++row) {
      backward_row(hidden, rstd[row], grad + row * hidden, x + row * hidden, weight, grad_x + row * hidden,
                   sums.data() + row / kRows * hidden);
    }
  });
  for (int64_t block = 1; block < blocks; ++block) {
    for (int64_t i = 0; i < hidden; ++i) sums[i] += sums[block * hidden + i];
  }
  for (int64_t i = 0; i < hidden; ++i) grad_weight[i] = static_cast<T>(blocks > 0 ? sums[i] : 0.0f);
}

void rms_norm_forward(const RmsNormShape& shape, float eps, const void* x, const void* weight, void* y, float* rstd) {
  with_type(shape.dtype, [&]<typename T>() {
    forward(shape, eps, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), rstd);
  });
}

void rms_norm_backward(const RmsNormShape& shape, const void* grad, const void* x, const void* weight,
                       const float* rstd, void* grad_x, void* grad_weight) {
  with_type(shape.dtype, [&]<typename T>() {
    backward(shape, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(weight), rstd,
             static_cast<T*>(grad_x), static_cast<T*>(grad_weight));
  });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_rms_norm_forward_stub, &illada::CPU_CAPABILITY::rms_norm_forward)
ALSO_REGISTER_AVX512_DISPATCH(illada_rms_norm_backward_stub, &illada::CPU_CAPABILITY::rms_norm_backward)

}  // namespace at::native
