#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "core/rank_search.h"
#include "cpu/check.h"
#include "cpu/ops.h"

namespace unirank::cpu {
namespace {

const std::int64_t* int64_data(const char* argument, const Tensor& t, std::int64_t length) {
  check(t.scalar_type() == ScalarType::Long, "global_topk: ", argument, " must be int64, got ", name(t.scalar_type()));
  check(t.dim() == 1 && t.size(0) == length, "global_topk: ", argument, " must have shape [", length, "], got ",
        shape(t));
  return static_cast<const std::int64_t*>(t.const_data_ptr());
}

void check_offsets(const std::int64_t* offsets, std::int64_t L, std::int64_t C) {
  check(offsets[0] == 0 && offsets[L] == C, "global_topk: offsets must run from 0 to ", C, ", got ", offsets[0], " to ",
        offsets[L]);
  for (std::int64_t l = 0; l < L; ++l) {
    check(offsets[l] < offsets[l + 1], "global_topk: offsets must increase, but segment ", l, " runs from ", offsets[l],
          " to ", offsets[l + 1]);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> global_topk(Tensor value, Tensor cost, Tensor dense_cost, Tensor offsets,
                                       std::int64_t budget, std::int64_t min_rank, std::int64_t multiple_of) {
  const ScalarType type = value.scalar_type();
  check(is_full(type), "global_topk: value must be float32 or float64, got ", name(type));
  check(value.dim() == 1, "global_topk: value must have shape [C], got ", shape(value));
  check(cost.dim() == 1, "global_topk: cost must have shape [L], got ", shape(cost));
  value = torch::stable::contiguous(value);
  cost = torch::stable::contiguous(cost);
  dense_cost = torch::stable::contiguous(dense_cost);
  offsets = torch::stable::contiguous(offsets);
  const std::int64_t C = value.size(0), L = cost.size(0);
  const std::int64_t* costs = int64_data("cost", cost, L);
  const std::int64_t* dense_costs = int64_data("dense_cost", dense_cost, L);
  const std::int64_t* bounds = int64_data("offsets", offsets, L + 1);
  check_offsets(bounds, L, C);

  const auto search = [&]<typename T>(const T* scores) {
    return search_ranks(Ranking<T>{scores, costs, dense_costs, bounds, L, budget, min_rank, multiple_of});
  };
  const RankPlan plan = type == ScalarType::Double ? search(static_cast<const double*>(value.const_data_ptr()))
                                                   : search(static_cast<const float*>(value.const_data_ptr()));

  Tensor ranks = torch::stable::new_empty(cost, {L});
  std::copy(plan.ranks.begin(), plan.ranks.end(), static_cast<std::int64_t*>(ranks.mutable_data_ptr()));
  Tensor threshold = torch::stable::new_empty(value, {}, ScalarType::Double);
  *static_cast<double*>(threshold.mutable_data_ptr()) = plan.threshold;
  return {ranks, threshold};
}

}  // namespace unirank::cpu
