// Vectors of a given width with the vector types of GCC and Clang, and the widening loads of every input dtype.
#pragma once

#include <cstdint>
#include <cstring>

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

template <int Bytes, typename T>
  requires(sizeof(T) == 2)
UNIRANK_INLINE Vector<float, Bytes> load_as(const T* p) {
  using Bits = Vector<std::uint32_t, Bytes>;
  return widen_bits(T{}, __builtin_convertvector((load_vector<Vector<std::uint16_t, Bytes / 2>>(p)), Bits));
}

// 16 elements of a row as fp64, in vectors, in an order that only the dtype decides.
inline constexpr int kStep = 16;
template <int Bytes>
using Step = Vector<double, Bytes>[kStep * sizeof(double) / Bytes];

template <int Bytes>
UNIRANK_INLINE void load_step(const double* p, Step<Bytes>& step) {
  std::memcpy(step, p, sizeof step);
}

template <int Bytes>
UNIRANK_INLINE void load_step(const float* p, Step<Bytes>& step) {
  for (auto& v : step) {
    v = __builtin_convertvector(load_as<Bytes / 2>(p), Vector<double, Bytes>);
    p += sizeof v / sizeof(double);
  }
}

// Even elements first, then odd ones: taking 32-bit lanes apart costs one operation each, where widening 16-bit lanes
// in order would shuffle.
template <int Bytes, typename T>
  requires(sizeof(T) == 2)
UNIRANK_INLINE void load_step(const T* p, Step<Bytes>& step) {
  using Bits = Vector<std::uint32_t, Bytes / 2>;
  constexpr int kPairs = sizeof(Step<Bytes>) / Bytes / 2;
  for (int u = 0; u < kPairs; ++u, p += 2 * sizeof(Bits) / sizeof(std::uint32_t)) {
    const auto both = load_vector<Bits>(p);
    step[u] = __builtin_convertvector(widen_bits(T{}, both & 0xffffu), Vector<double, Bytes>);
    step[kPairs + u] = __builtin_convertvector(widen_bits(T{}, both >> 16), Vector<double, Bytes>);
  }
}

}  // namespace unirank
