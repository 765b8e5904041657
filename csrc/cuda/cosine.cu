#include "cuda/launch.h"
#include "cuda/ops.h"
#include "kernels/cosine.cuh"

namespace unirank::cuda {
namespace {

constexpr const char* kOp = "cosine_accumulate_";

template <typename In>
void accumulate(const Tensor& state, const Tensor& x, const Tensor& y) {
  Scratch scratch(kOp, x);
  const kernels::Streams<In> streams{const_data<In>(x), const_data<In>(y), x.stride(0),
                                     y.stride(0),       x.size(0),         x.size(1)};
  kernels::accumulate_cosines(Queue(x), streams, scratch.take<double>(x.size(0)), data<double>(state));
}

}  // namespace

void cosine_accumulate_(Tensor state, Tensor x, Tensor y) {
  check_streams(kOp, state, x, y);
  check_device(kOp, "state", state, x);
  check_device(kOp, "y", y, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (x.size(0) == 0) return;
  x = with_rows(kOp, x);
  y = with_rows(kOp, y);
  with_element_type<kernels::Bf16, kernels::Fp16>(x.scalar_type(), [&]<typename In>() { accumulate<In>(state, x, y); });
}

}  // namespace unirank::cuda
