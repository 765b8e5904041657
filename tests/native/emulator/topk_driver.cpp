#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "dispatch.h"
#include "drivers.h"
#include "kernels/failure.cuh"
#include "kernels/topk.cuh"

namespace drivers {
namespace {

using namespace unirank::kernels;

template <typename T, typename U>
void fill(emulator::Guarded<T>& target, const std::vector<U>& source) {
  for (std::size_t i = 0; i < source.size(); ++i) target[static_cast<i64>(i)] = static_cast<T>(source[i]);
}

// In place of CUB, which promises the same: a stable ascending sort of pairs, and an inclusive sum.
struct Sort {
  template <typename Key>
  void operator()(const Key* keys, Key* sorted, const std::int32_t* index, std::int32_t* order, i64 C) const {
    std::vector<i64> places(static_cast<std::size_t>(C));
    std::iota(places.begin(), places.end(), 0);
    std::stable_sort(places.begin(), places.end(), [&](i64 a, i64 b) { return keys[a] < keys[b]; });
    for (i64 i = 0; i < C; ++i) {
      sorted[i] = keys[places[static_cast<std::size_t>(i)]];
      order[i] = index[places[static_cast<std::size_t>(i)]];
    }
  }
};

struct AddUp {
  void operator()(const i64* steps, i64* spent, i64 C) const { std::inclusive_scan(steps, steps + C, spent); }
};

template <typename Score>
Ranks run(const Ranking& ranking, unsigned seed) {
  const i64 C = static_cast<i64>(ranking.value.size()), L = static_cast<i64>(ranking.cost.size());
  emulator::Guarded<Score> value(C);
  emulator::Guarded<i64> cost(L), dense_cost(L), offsets(L + 1), steps(C), spent(C), floor(L), ranks(L);
  emulator::Guarded<SortKey<Score>> keys(C), sorted_keys(C);
  emulator::Guarded<std::int32_t> index(C), order(C);
  emulator::Guarded<double> next(L), threshold(1);
  emulator::Guarded<RankStatus> status(1);
  fill(value, ranking.value);
  fill(cost, ranking.cost);
  fill(dense_cost, ranking.dense_cost);
  fill(offsets, ranking.offsets);
  const RankProblem<Score> problem{value.data(),   cost.data(),      dense_cost.data(),   offsets.data(), C, L,
                                   ranking.budget, ranking.min_rank, ranking.multiple_of, ranking.pivoted};
  search_ranks(emulator::Launch{seed}, Sort{}, AddUp{}, problem,
               RankScratch<Score>{keys.data(), sorted_keys.data(), index.data(), order.data(), steps.data(),
                                  spent.data(), floor.data(), next.data(), status.data()},
               ranks.data(), threshold.data());
  const std::string failure = failure_message(status[0], problem, [](const auto* p) { return *p; });
  if (!failure.empty()) throw std::invalid_argument("global_topk: " + failure);
  for (const auto* operand : {&steps, &spent, &floor, &ranks}) operand->check();
  keys.check();
  index.check();
  next.check();
  threshold.check();
  status.check();
  return {std::vector<i64>(ranks.data(), ranks.data() + L), threshold[0]};
}

}  // namespace

Ranks topk(const Ranking& ranking, bool fp64_scores, unsigned seed) {
  return fp64_scores ? run<double>(ranking, seed) : run<float>(ranking, seed);
}

}  // namespace drivers
