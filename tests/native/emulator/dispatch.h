// From a dtype at run time to the kernels' element type, and operands laid out as a test asks.
#pragma once

#include <cstring>

#include "drivers.h"
#include "guarded.h"
#include "kernels/platform.cuh"

namespace drivers {

template <typename Call>
void with_element(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::Fp32:
      return call(float{});
    case Dtype::Fp64:
      return call(double{});
    case Dtype::Bf16:
      return call(unirank::kernels::Bf16{});
    case Dtype::Fp16:
      return call(unirank::kernels::Fp16{});
  }
}

// Rows [T, D] with `pad` poisoned elements between them.
template <typename In>
emulator::Guarded<In> lay_out(const void* source, i64 T, i64 D, const Setting& setting) {
  const i64 stride = D + setting.pad;
  emulator::Guarded<In> rows(T == 0 ? 0 : (T - 1) * stride + D, setting.shift);
  for (i64 t = 0; t < T && D > 0; ++t) {
    std::memcpy(static_cast<void*>(rows.data() + t * stride), static_cast<const In*>(source) + t * D, D * sizeof(In));
  }
  return rows;
}

}  // namespace drivers
