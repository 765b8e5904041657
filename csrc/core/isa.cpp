#include "core/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace unirank {
namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

Isa asked() {
  const char* name = std::getenv("UNIRANK_ISA");
  if (name && std::string_view(name) == "base") return Isa::base;
  if (name && std::string_view(name) == "avx2") return Isa::avx2;
  return Isa::avx512;
}

}  // namespace

Isa isa() {
  static const Isa chosen = std::min(widest(), asked());
  return chosen;
}

}  // namespace unirank
