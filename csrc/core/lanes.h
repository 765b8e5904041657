// Four elements at a time with the vector types of GCC and Clang: one source for SSE2 and AVX2.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/rows.h"

// Everything here must inline into the function that picked the instruction set.
#define UNIRANK_INLINE __attribute__((always_inline)) inline

// The wheel stays portable (SSE2) and still uses wide registers where the machine has them.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#define UNIRANK_WIDE __attribute__((target_clones("default", "arch=haswell")))
#else
#define UNIRANK_WIDE
#endif

namespace unirank {

inline constexpr int kLanes = 4;
using Lanes16 = std::uint16_t __attribute__((vector_size(2 * kLanes)));
using Lanes32 = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using LanesF = float __attribute__((vector_size(4 * kLanes)));
using LanesD = double __attribute__((vector_size(8 * kLanes)));

UNIRANK_INLINE LanesD load_lanes(const double* p) {
  LanesD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

UNIRANK_INLINE LanesF load_lanes(const float* p) {
  LanesF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

UNIRANK_INLINE Lanes32 load_bits(const void* p) {
  Lanes16 v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Lanes32);
}

UNIRANK_INLINE LanesF load_lanes(const Bf16* p) {
  return (LanesF)(load_bits(p) << 16);  // bf16 is the upper half of an fp32
}

UNIRANK_INLINE LanesF load_lanes(const Fp16* p) {
  const Lanes32 h = load_bits(p);
  const Lanes32 magnitude = h & 0x7fffu;
  // Normal: move the exponent from bias 15 to 127. Subnormal: the magnitude counts units of 2^-24.
  // Infinity and NaN: the exponent becomes all ones.
  const Lanes32 normal = (magnitude << 13) + (112u << 23);
  const LanesF subnormal = __builtin_convertvector(magnitude, LanesF) * 0x1p-24f;
  const Lanes32 special = (magnitude << 13) | 0x7f800000u;
  const Lanes32 is_special = (Lanes32)(magnitude >= 0x7c00u);
  const Lanes32 is_subnormal = (Lanes32)(magnitude < 0x0400u);
  const Lanes32 finite = (is_subnormal & (Lanes32)subnormal) | (~is_subnormal & normal);
  return (LanesF)((is_special & special) | (~is_special & finite) | ((h & 0x8000u) << 16));
}

template <typename T>
UNIRANK_INLINE LanesD load_lanes_fp64(const T* p) {
  return __builtin_convertvector(load_lanes(p), LanesD);
}

}  // namespace unirank
