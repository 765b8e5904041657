// Vectors of a given width with the vector types of GCC and Clang, and the widening loads of every input dtype.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/isa.h"
#include "core/rows.h"

namespace unirank {

template <typename T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};

// Bytes / sizeof(T) elements in one register, or in several where the machine's are narrower.
template <typename T, int Bytes>
using Vector = typename VectorOf<T, Bytes>::type;

template <typename V>
UNIRANK_INLINE V load_vector(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// `load_as<Bytes>(p)`: the elements at p in the compute type (fp64 for fp64, fp32 for everything shorter).
template <int Bytes>
UNIRANK_INLINE Vector<double, Bytes> load_as(const double* p) {
  return load_vector<Vector<double, Bytes>>(p);
}

template <int Bytes>
UNIRANK_INLINE Vector<float, Bytes> load_as(const float* p) {
  return load_vector<Vector<float, Bytes>>(p);
}

template <int Bytes>
UNIRANK_INLINE Vector<std::uint32_t, Bytes> load_bits(const void* p) {
  return __builtin_convertvector((load_vector<Vector<std::uint16_t, Bytes / 2>>(p)), Vector<std::uint32_t, Bytes>);
}

// fp32 from the 16 bits of a bf16 or an fp16 in the low half of each lane.
template <typename Bits>
UNIRANK_INLINE auto widen_bits(Bf16, Bits h) {
  return (Vector<float, sizeof(Bits)>)(h << 16);  // bf16 is the upper half of an fp32
}

template <typename Bits>
UNIRANK_INLINE auto widen_bits(Fp16, Bits h) {
  using Float = Vector<float, sizeof(Bits)>;
  const Bits magnitude = h & 0x7fffu;
  // Normal: move the exponent from bias 15 to 127. Subnormal: the magnitude counts units of 2^-24.
  // Infinity and NaN: the exponent becomes all ones.
  const Bits normal = (magnitude << 13) + (112u << 23);
  // Converted as signed integers: machines below AVX-512 have no unsigned conversion.
  const Float subnormal = __builtin_convertvector((Vector<std::int32_t, sizeof(Bits)>)magnitude, Float) * 0x1p-24f;
  const Bits special = (magnitude << 13) | 0x7f800000u;
  const Bits is_special = (Bits)(magnitude >= 0x7c00u);
  const Bits is_subnormal = (Bits)(magnitude < 0x0400u);
  const Bits finite = (is_subnormal & (Bits)subnormal) | (~is_subnormal & normal);
  return (Float)((is_special & special) | (~is_special & finite) | ((h & 0x8000u) << 16));
}

template <int Bytes>
UNIRANK_INLINE Vector<float, Bytes> load_as(const Bf16* p) {
  return widen_bits(Bf16{}, load_bits<Bytes>(p));
}

// The two conversions below are named as instructions where there is one: GCC 12 spells out the first as a dozen
// integer operations, and does the second on eight floats by taking the register apart.
template <int Bytes>
UNIRANK_INLINE Vector<float, Bytes> load_as(const Fp16* p) {
#if defined(__x86_64__)
  if constexpr (Bytes >= 32) {
    const auto h = load_vector<Vector<std::uint16_t, Bytes / 2>>(p);
    Vector<float, Bytes> v;
    asm("vcvtph2ps %1, %0" : "=v"(v) : "v"(h));
    return v;
  }
#endif
  return widen_bits(Fp16{}, load_bits<Bytes>(p));
}

template <int Bytes>
UNIRANK_INLINE Vector<double, Bytes> widen(Vector<float, Bytes / 2> v) {
#if defined(__x86_64__)
  if constexpr (Bytes == 64) {
    Vector<double, Bytes> w;
    asm("vcvtps2pd %1, %0" : "=v"(w) : "v"(v));
    return w;
  }
#endif
  return __builtin_convertvector(v, Vector<double, Bytes>);
}

// 16 elements of a row as fp64, in vectors, in an order that only the dtype decides.
inline constexpr int kStep = 16;
template <int Bytes>
using Step = Vector<double, Bytes>[kStep * sizeof(double) / Bytes];

template <int Bytes>
UNIRANK_INLINE void load_step(const double* p, Step<Bytes>& step) {
  std::memcpy(step, p, sizeof step);
}

template <int Bytes, typename T>
  requires(std::is_same_v<T, float> || std::is_same_v<T, Fp16>)
UNIRANK_INLINE void load_step(const T* p, Step<Bytes>& step) {
  for (auto& v : step) {
    v = widen<Bytes>(load_as<Bytes / 2>(p));
    p += sizeof v / sizeof(double);
  }
}

// Even elements first, then odd ones: taking 32-bit lanes apart costs one operation each, where widening 16-bit lanes
// in order would shuffle.
template <int Bytes>
UNIRANK_INLINE void load_step(const Bf16* p, Step<Bytes>& step) {
  using Bits = Vector<std::uint32_t, Bytes / 2>;
  constexpr int kPairs = sizeof(Step<Bytes>) / Bytes / 2;
  for (int u = 0; u < kPairs; ++u, p += 2 * sizeof(Bits) / sizeof(std::uint32_t)) {
    const auto both = load_vector<Bits>(p);
    step[u] = widen<Bytes>(widen_bits(Bf16{}, both & 0xffffu));
    step[kPairs + u] = widen<Bytes>(widen_bits(Bf16{}, both >> 16));
  }
}

}  // namespace unirank
