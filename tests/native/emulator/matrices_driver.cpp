#include "kernels/matrices.cuh"

#include <cstring>

#include "drivers.h"
#include "guarded.h"

namespace drivers {
namespace {

template <typename T>
emulator::Guarded<T> copied(const void* source, i64 count, const Setting& setting) {
  emulator::Guarded<T> copy(count, setting.shift);
  if (count) std::memcpy(copy.data(), source, static_cast<std::size_t>(count) * sizeof(T));
  return copy;
}

template <typename T>
i64 scanned(const void* a, i64 B, i64 m, i64 n, bool upper, const Setting& setting) {
  auto matrices = copied<T>(a, B * m * n, setting);
  emulator::Guarded<unsigned long long> found(1);
  found[0] = 0;
  unirank::kernels::scan_matrices(emulator::Launch{setting.seed}, matrices.data(), B, m, n, upper, found.data());
  found.check();
  matrices.check();
  return static_cast<i64>(found[0]);
}

template <typename T>
void turned(const void* source, i64 n, void* target, const Setting& setting) {
  auto from = copied<T>(source, n * n, setting);
  emulator::Guarded<T> to(n * n);
  unirank::kernels::transpose_square(emulator::Launch{setting.seed}, from.data(), n, to.data());
  to.check();
  std::memcpy(target, to.data(), static_cast<std::size_t>(n * n) * sizeof(T));
}

}  // namespace

i64 scan(bool fp64, const void* a, i64 B, i64 m, i64 n, bool upper, const Setting& setting) {
  return (fp64 ? scanned<double> : scanned<float>)(a, B, m, n, upper, setting);
}

void transpose(bool fp64, const void* source, i64 n, void* target, const Setting& setting) {
  (fp64 ? turned<double> : turned<float>)(source, n, target, setting);
}

}  // namespace drivers
