// Vectors of floats, and rows of float or bfloat16 as such. Included by kernels alone: everything here is compiled once
// for each CPU capability.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace illada::CPU_CAPABILITY {

using Floats = at::vec::Vectorized<float>;
using Words = at::vec::Vectorized<int32_t>;
constexpr int64_t kLanes = Floats::size();
constexpr int64_t kStep = 2 * kLanes;  // elements that are worked on together: one vector of bfloat16, two of float

// The first `count` <= kStep elements as floats, and zeros.
template <typename T>
std::pair<Floats, Floats> load_two(const T* from, int64_t count = kStep) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == kStep) return {Floats::loadu(from), Floats::loadu(from + kLanes)};
    return {Floats::loadu(from, std::min(count, kLanes)),
            count > kLanes ? Floats::loadu(from + kLanes, count - kLanes) : Floats(0.0f)};
  } else {
    using Elements = at::vec::Vectorized<T>;
    const auto [low, high] =
        at::vec::convert_to_float<T>(count == kStep ? Elements::loadu(from) : Elements::loadu(from, count));
    return {low, high};
  }
}

// at::vec rounds to bfloat16 in a dozen instructions; processors that have one for it are asked at run time, as no
// build of the kernels demands it.
#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__)
inline const bool kRoundsNatively = __builtin_cpu_supports("avx512bf16");

inline bool round_natively(const Floats& low, const Floats& high, at::vec::Vectorized<at::BFloat16>& rounded) {
  if (!kRoundsNatively) return false;
  __m512i result;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(result) : "v"(static_cast<__m512>(high)), "v"(static_cast<__m512>(low)));
  rounded = result;
  return true;
}
#else
inline bool round_natively(const Floats&, const Floats&, at::vec::Vectorized<at::BFloat16>&) { return false; }
#endif

template <typename T>
void store_two(T* to, const Floats& low, const Floats& high, int64_t count = kStep) {
  if constexpr (std::is_same_v<T, float>) {
    low.store(to, std::min(count, kLanes));
    if (count > kLanes) high.store(to + kLanes, count - kLanes);
  } else {
    at::vec::Vectorized<T> rounded;
    if (!round_natively(low, high, rounded)) rounded = at::vec::convert_from_float<T>(low, high);
    rounded.store(to, count);
  }
}

// Calls function(first, count) for each step of `n` elements.
template <typename Function>
void for_steps(int64_t n, const Function& function) {
  int64_t first = 0;
  for (; first + kStep <= n; first += kStep) function(first, kStep);
  if (first < n) function(first, n - first);
}

inline float sum_of(const Floats& values) {
  return at::vec::vec_reduce_all<float>([](const Floats& a, const Floats& b) { return a + b; }, values);
}

inline float largest_of(const Floats& values) {
  return at::vec::vec_reduce_all<float>([](const Floats& a, const Floats& b) { return at::vec::maximum(a, b); },
                                        values);
}

// 2^x to 2e-7; 0 below 2^-126; NaN stays NaN. x <= 127.
inline Floats exp2(const Floats& exponent) {
  const Floats x = at::vec::clamp_min(exponent, Floats(-127.0f));
  const Floats whole = x.round(), rest = x - whole;  // |rest| <= 1/2
  // minimax polynomial of 2^rest
  Floats y = at::vec::fmadd(rest, Floats(1.3264715e-3f), Floats(9.6715130e-3f));
  y = at::vec::fmadd(y, rest, Floats(5.5507340e-2f));
  y = at::vec::fmadd(y, rest, Floats(2.4022242e-1f));
  y = at::vec::fmadd(y, rest, Floats(6.9314700e-1f));
  y = at::vec::fmadd(y, rest, Floats(1.0f));
  const Words power = (at::vec::convert_to_int_of_same_size(whole) + Words(127)) << Words(23);
  return y * at::vec::cast<float, int32_t>(power);
}

}  // namespace illada::CPU_CAPABILITY
