#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "core/rank_search.h"
#include "cpu/ops.h"
#include "operands.h"

namespace unirank::cpu {
namespace {

constexpr const char* kOp = "global_topk";

void check_offsets(const std::int64_t* offsets, std::int64_t L, std::int64_t C) {
  check(offsets[0] == 0 && offsets[L] == C, kOp, ": offsets must run from 0 to ", C, ", got ", offsets[0], " to ",
        offsets[L]);
  for (std::int64_t l = 0; l < L; ++l) {
    check(offsets[l] < offsets[l + 1], kOp, ": offsets must increase, but segment ", l, " runs from ", offsets[l],
          " to ", offsets[l + 1]);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> global_topk(Tensor value, Tensor cost, Tensor dense_cost, Tensor offsets,
                                       std::int64_t budget, std::int64_t min_rank, std::int64_t multiple_of,
                                       bool pivoted) {
  check_ranking(kOp, value, cost);
  const std::int64_t C = value.size(0), L = cost.size(0);
  check_integers(kOp, "cost", cost, L);
  check_integers(kOp, "dense_cost", dense_cost, L);
  check_integers(kOp, "offsets", offsets, L + 1);
  value = torch::stable::contiguous(value);
  cost = torch::stable::contiguous(cost);
  dense_cost = torch::stable::contiguous(dense_cost);
  offsets = torch::stable::contiguous(offsets);
  const std::int64_t* costs = const_data<std::int64_t>(cost);
  const std::int64_t* dense_costs = const_data<std::int64_t>(dense_cost);
  const std::int64_t* bounds = const_data<std::int64_t>(offsets);
  check_offsets(bounds, L, C);

  const auto search = [&]<typename T>(const T* scores) {
    return search_ranks(Ranking<T>{scores, costs, dense_costs, bounds, L, budget, min_rank, multiple_of, pivoted});
  };
  const RankPlan plan =
      value.scalar_type() == ScalarType::Double ? search(const_data<double>(value)) : search(const_data<float>(value));

  Tensor ranks = torch::stable::new_empty(cost, {L});
  std::copy(plan.ranks.begin(), plan.ranks.end(), data<std::int64_t>(ranks));
  Tensor threshold = torch::stable::new_empty(value, {}, ScalarType::Double);
  *data<double>(threshold) = plan.threshold;
  return {ranks, threshold};
}

}  // namespace unirank::cpu
