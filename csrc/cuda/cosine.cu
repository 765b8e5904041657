#include "cuda/launch.h"
#include "cuda/ops.h"
#include "kernels/cosine.cuh"

namespace unirank::cuda {
namespace {

template <typename In>
void accumulate(const Tensor& state, const Tensor& x, const Tensor& y, const bool* mask) {
  Scratch scratch(x);
  const kernels::Streams<In> streams{const_data<In>(x), const_data<In>(y), x.stride(0),
                                     y.stride(0),       x.size(0),         x.size(1)};
  kernels::accumulate_cosines(Queue(x), streams, mask, scratch.take<double>(x.size(0)), data<double>(state));
}

}  // namespace

void cosine_accumulate_(Tensor state, Tensor x, Tensor y, std::optional<Tensor> mask) {
  const char* op = "cosine_accumulate_";
  check(state.scalar_type() == ScalarType::Double && state.dim() == 1 && state.size(0) == 3 && state.is_contiguous(),
        op, ": state must be contiguous float64 of shape [3], got ", name(state.scalar_type()), " of shape ",
        shape(state));
  check(x.dim() == 2, op, ": x must have shape [T, D], got ", shape(x));
  check(y.dim() == 2 && y.size(0) == x.size(0) && y.size(1) == x.size(1), op, ": y must have the shape of x, ",
        shape(x), ", got ", shape(y));
  const ScalarType type = x.scalar_type();
  check(is_floating(type), op, ": x must be float32, float64, bfloat16 or float16, got ", name(type));
  check(y.scalar_type() == type, op, ": y must have the dtype of x, ", name(type), ", got ", name(y.scalar_type()));
  check_device(op, "state", state, x);
  check_device(op, "y", y, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const bool* counted = device_mask(op, mask, x);
  if (x.size(0) == 0) return;
  x = with_rows(x);
  y = with_rows(y);
  switch (type) {
    case ScalarType::Double:
      return accumulate<double>(state, x, y, counted);
    case ScalarType::Float:
      return accumulate<float>(state, x, y, counted);
    case ScalarType::BFloat16:
      return accumulate<kernels::Bf16>(state, x, y, counted);
    default:
      return accumulate<kernels::Fp16>(state, x, y, counted);
  }
}

}  // namespace unirank::cuda
