#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "core/rows.h"
#include "cpu/check.h"
#include "cpu/ops.h"

namespace unirank::cpu {
namespace {

// Elements of work below which handing rows to another thread costs more than it saves.
constexpr std::int64_t kGrain = 32768;

// Each row's cosine goes to its own slot, and the slots are added up in order: the bits cannot depend on the threads.
template <typename T>
void accumulate(double* state, const Tensor& x, const Tensor& y, const bool* mask) {
  const std::int64_t rows = x.size(0), D = x.size(1);
  const T* xp = static_cast<const T*>(x.const_data_ptr());
  const T* yp = static_cast<const T*>(y.const_data_ptr());
  std::vector<double> cosine(static_cast<std::size_t>(rows));
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, D));
  torch::stable::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      if (!mask || mask[t]) cosine[t] = row_cosine(xp + t * D, yp + t * D, D);
    }
  });
  double sum = 0, squares = 0;
  std::int64_t count = 0;
  for (std::int64_t t = 0; t < rows; ++t) {
    if (mask && !mask[t]) continue;
    sum += cosine[t];
    squares += cosine[t] * cosine[t];
    ++count;
  }
  state[0] += sum;
  state[1] += squares;
  state[2] += static_cast<double>(count);
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
  if (mask) mask = torch::stable::contiguous(*mask);
  const bool* counted = mask_data(op, mask, x.size(0));
  x = torch::stable::contiguous(x);
  y = torch::stable::contiguous(y);
  double* sums = static_cast<double*>(state.mutable_data_ptr());
  switch (type) {
    case ScalarType::Double:
      return accumulate<double>(sums, x, y, counted);
    case ScalarType::Float:
      return accumulate<float>(sums, x, y, counted);
    case ScalarType::BFloat16:
      return accumulate<Bf16>(sums, x, y, counted);
    default:
      return accumulate<Fp16>(sums, x, y, counted);
  }
}

}  // namespace unirank::cpu
