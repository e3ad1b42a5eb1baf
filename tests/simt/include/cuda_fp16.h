// IEEE half precision and its conversions on the host, as the device rounds: to nearest even, NaN to NaN.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 0x1f;
  const int fraction = value.bits & 0x3ff;
  float magnitude;
  if (exponent == 0x1f)
    magnitude = fraction ? NAN : INFINITY;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  else
    magnitude = std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // halfway to the first value too large
  int exponent;
  std::frexp(magnitude, &exponent);
  if (exponent < -13 || magnitude == 0) exponent = -13;  // subnormals share the smallest normal numbers' spacing
  // In units of the last place; nearbyint rounds to even. Adding, not joining: a carry moves to the next exponent.
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return {static_cast<uint16_t>(sign + ((exponent + 13) << 10) + fraction)};
}
