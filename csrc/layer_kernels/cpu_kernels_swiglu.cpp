// SwiGLU: y = silu(gate) * up, where a row of x holds gate [f], then up [f] (arXiv 2002.05202, eq. 6).

#include <ATen/Parallel.h>

#include "../cpu/vectors.h"
#include "cpu_kernels.h"

namespace illada::CPU_CAPABILITY {
namespace {

// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

// 1 / (1 + e^-x)
Floats sigmoid(const Floats& x) {
  const Floats exponent = at::vec::clamp_max(x * Floats(-1.44269504f), Floats(126.0f));
  return Floats(1.0f) / (Floats(1.0f) + exp2(exponent));
}

template <typename T>
void forward(int64_t rows, int64_t width, const T* x, T* y) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *gate = x + 2 * row * width, *up = gate + width;
      for_steps(width, [&](int64_t i, int64_t count) {
        const auto [a, b] = load_two(gate + i, count);
        const auto [u, v] = load_two(up + i, count);
        store_two(y + row * width + i, a * sigmoid(a) * u, b * sigmoid(b) * v, count);
      });
    }
  });
}

// Gradients of gate and up, given that of y.
std::pair<Floats, Floats> differentiate(const Floats& grad, const Floats& gate, const Floats& up) {
  const Floats s = sigmoid(gate), silu = gate * s;
  return {grad * up * (s + silu * (Floats(1.0f) - s)), grad * silu};
}

template <typename T>
void backward(int64_t rows, int64_t width, const T* grad, const T* x, T* grad_x) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *gate = x + 2 * row * width, *up = gate + width;
      T *grad_gate = grad_x + 2 * row * width, *grad_up = grad_gate + width;
      for_steps(width, [&](int64_t i, int64_t count) {
        const auto [g0, g1] = load_two(grad + row * width + i, count);
        const auto [a0, a1] = load_two(gate + i, count);
        const auto [u0, u1] = load_two(up + i, count);
        const auto [da0, du0] = differentiate(g0, a0, u0);
        const auto [da1, du1] = differentiate(g1, a1, u1);
        store_two(grad_gate + i, da0, da1, count);
        store_two(grad_up + i, du0, du1, count);
      });
    }
  });
}

void swiglu_forward(at::ScalarType dtype, int64_t rows, int64_t width, const void* x, void* y) {
  with_type(dtype, [&]<typename T>() { forward(rows, width, static_cast<const T*>(x), static_cast<T*>(y)); });
}

void swiglu_backward(at::ScalarType dtype, int64_t rows, int64_t width, const void* grad, const void* x, void* grad_x) {
  with_type(dtype, [&]<typename T>() {
    backward(rows, width, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<T*>(grad_x));
  });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_swiglu_forward_stub, &illada::CPU_CAPABILITY::swiglu_forward)
ALSO_REGISTER_AVX512_DISPATCH(illada_swiglu_backward_stub, &illada::CPU_CAPABILITY::swiglu_backward)

}  // namespace at::native
