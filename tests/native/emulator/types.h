// The 16-bit floats of CUDA as raw bits, with the one conversion that kernels use: to fp32, exact.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

struct __nv_bfloat16 {
  std::uint16_t bits;
};

struct __half {
  std::uint16_t bits;
};

// bf16 is the upper half of an fp32.
inline float __bfloat162float(__nv_bfloat16 v) { return std::bit_cast<float>(std::uint32_t{v.bits} << 16); }

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float magnitude = 0;
  if (exponent == 31) {
    magnitude = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  }
  return v.bits >> 15 ? -magnitude : magnitude;
}
