// Which ranks does one global ranking of all components buy for a budget? Exact, deterministic, free of torch.
#pragma once

#include <cstdint>
#include <vector>

namespace unirank {

// L segments of components, one per linear; offsets has L + 1 entries. `value` is non-increasing in a segment.
template <typename T>
struct Ranking {
  const T* value;                  // [C]
  const std::int64_t* cost;        // [L] M + N
  const std::int64_t* dense_cost;  // [L] price of the dense matrix, M N
  const std::int64_t* offsets;     // [L + 1]
  std::int64_t L;
  std::int64_t budget, min_rank, multiple_of;
  bool pivoted;  // rank r costs r * (cost - r), else r * cost; at most dense_cost either way
};

struct RankPlan {
  std::vector<std::int64_t> ranks;  // [L]
  double threshold;                 // smallest score that was bought beyond the floor; +inf when none was
};

// Throws std::invalid_argument, with what was got, for a malformed ranking or a budget below the floor.
template <typename T>
RankPlan search_ranks(const Ranking<T>& ranking);

}  // namespace unirank
