#include "dispatch.h"
#include "drivers.h"
#include "kernels/cosine.cuh"

namespace drivers {

std::array<double, 3> cosine(Dtype dtype, const void* x, const void* y, i64 T, i64 D, const Setting& setting) {
  emulator::Guarded<double> state(3), scratch(T);
  for (int i = 0; i < 3; ++i) state[i] = 0;
  if (T == 0) return {};  // as in the launcher: there is nothing to launch
  with_element(dtype, [&]<typename In>(In) {
    auto xs = lay_out<In>(x, T, D, setting), ys = lay_out<In>(y, T, D, setting);
    const i64 stride = D + setting.pad;
    unirank::kernels::accumulate_cosines(emulator::Launch{setting.seed},
                                         unirank::kernels::Streams<In>{xs.data(), ys.data(), stride, stride, T, D},
                                         scratch.data(), state.data());
  });
  state.check();
  scratch.check();
  return {state[0], state[1], state[2]};
}

}  // namespace drivers
