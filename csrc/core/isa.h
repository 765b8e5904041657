// One source, three vector widths: a kernel is a template over the width in bytes, and the machine chooses when it
// runs. The wheel stays portable that way. A kernel's sums have one order at every width, so AVX2 and AVX-512 give
// equal bits.
#pragma once

// Everything in a kernel's body must inline into the function that carries the instruction set.
#define UNIRANK_INLINE __attribute__((always_inline)) inline

namespace unirank {

enum class Isa { base, avx2, avx512 };

// The widest set that this machine has, or the one that UNIRANK_ISA=base|avx2|avx512 lowers it to (for tests).
Isa isa();

#if defined(__x86_64__)
#define UNIRANK_AVX2 __attribute__((target("avx2,fma")))
#define UNIRANK_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

template <typename Body, typename... Args>
UNIRANK_AVX2 auto run_avx2(Args... args) {
  return Body::template run<32>(args...);
}

template <typename Body, typename... Args>
UNIRANK_AVX512 auto run_avx512(Args... args) {
  return Body::template run<64>(args...);
}
#endif

// Body::run<width in bytes>(args...) at the width of this machine; arguments are passed by value.
template <typename Body, typename... Args>
auto dispatch(Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512<Body>(args...);
  if (isa() == Isa::avx2) return run_avx2<Body>(args...);
#endif
  return Body::template run<16>(args...);
}

}  // namespace unirank
