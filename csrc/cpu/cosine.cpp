#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "core/rows.h"
#include "cpu/ops.h"
#include "operands.h"

namespace unirank::cpu {
namespace {

// Elements of work below which handing rows to another thread costs more than it saves.
constexpr std::int64_t kGrain = 32768;

// Each row's cosine goes to its own slot, and the slots are added up in order: the bits cannot depend on the threads.
template <typename T>
void accumulate(double* state, const Tensor& x, const Tensor& y) {
  const std::int64_t rows = x.size(0), D = x.size(1);
  const T* xp = const_data<T>(x);
  const T* yp = const_data<T>(y);
  std::vector<double> cosine(static_cast<std::size_t>(rows));
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, D));
  torch::stable::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) cosine[t] = row_cosine(xp + t * D, yp + t * D, D);
  });
  double sum = 0, squares = 0;
  for (const double c : cosine) {
    sum += c;
    squares += c * c;
  }
  state[0] += sum;
  state[1] += squares;
  state[2] += static_cast<double>(rows);
}

}  // namespace

void cosine_accumulate_(Tensor state, Tensor x, Tensor y) {
  check_streams("cosine_accumulate_", state, x, y);
  x = torch::stable::contiguous(x);
  y = torch::stable::contiguous(y);
  double* sums = data<double>(state);
  with_element_type<Bf16, Fp16>(x.scalar_type(), [&]<typename In>() { accumulate<In>(sums, x, y); });
}

}  // namespace unirank::cpu
