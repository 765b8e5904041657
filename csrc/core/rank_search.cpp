#include "core/rank_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>

namespace unirank {
namespace {

using i64 = std::int64_t;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument("global_topk: " + message); }

// One segment with its prices: "rank r" costs min(r * unit(r), dense_cost), without ever forming a product that
// overflows. Pivoted storage leaves out the r * r numbers of an identity; with K <= cost / 2 a larger rank costs more.
struct Segment {
  i64 begin, K, cost, dense_cost;
  bool pivoted;
  i64 dense_rank;  // smallest r with r * unit(r) >= dense_cost; beyond K where there is none

  Segment(i64 begin, i64 K, i64 cost, i64 dense_cost, bool pivoted)
      : begin(begin), K(K), cost(cost), dense_cost(dense_cost), pivoted(pivoted), dense_rank(find_dense_rank()) {}

  i64 unit(i64 r) const { return pivoted ? cost - r : cost; }

  i64 find_dense_rank() const {
    if (!pivoted) return (dense_cost - 1) / cost + 1;
    i64 low = 1, high = K + 1;
    while (low < high) {
      const i64 middle = low + (high - low) / 2;
      if (middle > (dense_cost - 1) / unit(middle)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  i64 price(i64 r) const { return r >= dense_rank ? dense_cost : r * unit(r); }
  i64 normalise(i64 r) const { return r >= dense_rank ? K : r; }

  i64 round_up(i64 r, i64 multiple_of) const {
    if (r >= K || multiple_of > K) return r == 0 ? 0 : K;
    const i64 rounded = (r + multiple_of - 1) / multiple_of * multiple_of;
    return rounded > K ? K : rounded;
  }
};

template <typename T>
std::vector<Segment> checked_segments(const Ranking<T>& g) {
  if (g.min_rank < 0) fail("min_rank must be at least 0, got " + std::to_string(g.min_rank));
  if (g.multiple_of < 1) fail("multiple_of must be at least 1, got " + std::to_string(g.multiple_of));
  std::vector<Segment> segments;
  segments.reserve(static_cast<std::size_t>(g.L));
  i64 dense_total = 0;
  for (i64 l = 0; l < g.L; ++l) {
    const i64 begin = g.offsets[l], end = g.offsets[l + 1], cost = g.cost[l], dense = g.dense_cost[l];
    const std::string name = "segment " + std::to_string(l);
    if (cost <= 0) fail("cost must be positive, got " + std::to_string(cost) + " at " + name);
    if (dense <= 0) fail("dense_cost must be positive, got " + std::to_string(dense) + " at " + name);
    if (g.pivoted && cost / 2 < end - begin) {
      fail("with pivoted=True, cost must be at least twice a segment's length, got cost " + std::to_string(cost) +
           " and length " + std::to_string(end - begin) + " at " + name);
    }
    if (__builtin_add_overflow(dense_total, dense, &dense_total)) fail("the dense costs add up to more than an int64");
    for (i64 i = begin; i < end; ++i) {
      if (!std::isfinite(g.value[i]))
        fail("value must be finite, got " + std::to_string(g.value[i]) + " at index " + std::to_string(i));
      if (i > begin && g.value[i] > g.value[i - 1]) {
        fail("value must be non-increasing inside a segment, but rises at index " + std::to_string(i) + " in " + name);
      }
    }
    segments.emplace_back(begin, end - begin, cost, dense, g.pivoted);
  }
  return segments;
}

std::vector<i64> floor_ranks(const std::vector<Segment>& segments, i64 budget, i64 min_rank, i64 multiple_of) {
  std::vector<i64> ranks;
  i64 total = 0;
  for (const Segment& s : segments) {
    ranks.push_back(s.normalise(s.round_up(std::min(min_rank, s.K), multiple_of)));
    total += s.price(ranks.back());
  }
  if (total > budget) {
    fail("min_rank " + std::to_string(min_rank) + " needs " + std::to_string(total) + " parameters but the budget is " +
         std::to_string(budget));
  }
  return ranks;
}

// Integers in the order of the doubles, so that bisection over scores ends after 64 steps.
// Finite input only; -0.0 and 0.0 are different keys of equal scores, which comparison by value tolerates.
std::uint64_t key_of(double score) {
  const auto bits = std::bit_cast<std::uint64_t>(score);
  return bits >> 63 ? ~bits : bits | (1ull << 63);
}

double score_of(std::uint64_t key) { return std::bit_cast<double>(key >> 63 ? key & ~(1ull << 63) : ~key); }

// Components of the segment with a score of at least (or above) `score`: a prefix, because it is sorted.
template <typename T>
i64 count_at_least(const T* value, const Segment& s, double score) {
  const T* first = value + s.begin;
  return std::partition_point(first, first + s.K, [=](T v) { return v >= score; }) - first;
}

template <typename T>
i64 count_above(const T* value, const Segment& s, double score) {
  const T* first = value + s.begin;
  return std::partition_point(first, first + s.K, [=](T v) { return v > score; }) - first;
}

// Raises `ranks` from the floor to the longest affordable prefix of (score descending, segment, component).
// Prices never fall along the order, so the prefix ends inside the largest score whose whole tie is too expensive.
template <typename T>
void buy_prefix(const Ranking<T>& g, const std::vector<Segment>& segments, std::vector<i64>& ranks) {
  const auto too_expensive = [&](double score) {
    i64 total = 0;
    for (std::size_t l = 0; l < segments.size(); ++l) {
      total += segments[l].price(std::max(ranks[l], count_at_least(g.value, segments[l], score)));
    }
    return total > g.budget;
  };
  const double largest = std::numeric_limits<double>::max();
  if (!too_expensive(-largest)) {
    for (std::size_t l = 0; l < segments.size(); ++l) ranks[l] = segments[l].K;
    return;
  }
  // Invariant: the score of `expensive` is too expensive, that of `affordable` is not (above every score: the floor).
  std::uint64_t expensive = key_of(-largest), affordable = key_of(largest) + 1;
  while (affordable - expensive > 1) {
    const std::uint64_t middle = expensive + (affordable - expensive) / 2;
    (too_expensive(score_of(middle)) ? expensive : affordable) = middle;
  }
  const double tie = score_of(expensive);
  std::vector<i64> wanted(segments.size());
  i64 total = 0;
  for (std::size_t l = 0; l < segments.size(); ++l) {
    wanted[l] = count_at_least(g.value, segments[l], tie);
    ranks[l] = std::max(ranks[l], count_above(g.value, segments[l], tie));
    total += segments[l].price(ranks[l]);
  }
  for (std::size_t l = 0; l < segments.size(); ++l) {
    const Segment& s = segments[l];
    for (; ranks[l] < wanted[l]; ++ranks[l]) {
      const i64 step = s.price(ranks[l] + 1) - s.price(ranks[l]);
      if (step > g.budget - total) return;
      total += step;
    }
  }
}

template <typename T>
double smallest_bought(const T* value, const std::vector<Segment>& segments, const std::vector<i64>& floor,
                       const std::vector<i64>& ranks) {
  double threshold = std::numeric_limits<double>::infinity();
  for (std::size_t l = 0; l < segments.size(); ++l) {
    if (ranks[l] > floor[l]) threshold = std::min(threshold, double(value[segments[l].begin + ranks[l] - 1]));
  }
  return threshold + 0.0;  // -0.0 becomes 0.0: equal scores give equal bits
}

void round_down(const std::vector<Segment>& segments, const std::vector<i64>& floor, i64 multiple_of,
                std::vector<i64>& ranks) {
  for (std::size_t l = 0; l < segments.size(); ++l) {
    if (ranks[l] >= segments[l].dense_rank) continue;
    ranks[l] = std::max(floor[l], ranks[l] / multiple_of * multiple_of);
  }
}

// What rounding down freed is spent again in score order. A segment's next component is always the one at its rank,
// so a heap of one entry a segment visits the components in the order of the whole walk.
template <typename T>
void fill_residual(const Ranking<T>& g, const std::vector<Segment>& segments, std::vector<i64>& ranks) {
  struct Next {
    T value;
    std::size_t l;
    bool operator<(const Next& other) const {  // std::priority_queue hands out the largest
      return value != other.value ? value < other.value : l > other.l;
    }
  };
  std::priority_queue<Next> queue;
  i64 left = g.budget;
  const auto push = [&](std::size_t l) {
    if (ranks[l] < segments[l].K) queue.push({g.value[segments[l].begin + ranks[l]], l});
  };
  for (std::size_t l = 0; l < segments.size(); ++l) {
    left -= segments[l].price(ranks[l]);
    push(l);
  }
  while (!queue.empty()) {
    const std::size_t l = queue.top().l;
    queue.pop();
    const Segment& s = segments[l];
    const i64 target = s.normalise(s.round_up(ranks[l] + 1, g.multiple_of));
    const i64 step = s.price(target) - s.price(ranks[l]);
    if (step > left) continue;  // the segment is closed: it is not pushed again
    left -= step;
    ranks[l] = target;
    push(l);
  }
}

}  // namespace

template <typename T>
RankPlan search_ranks(const Ranking<T>& g) {
  const std::vector<Segment> segments = checked_segments(g);
  const std::vector<i64> floor = floor_ranks(segments, g.budget, g.min_rank, g.multiple_of);
  std::vector<i64> ranks = floor;
  buy_prefix(g, segments, ranks);
  const double threshold = smallest_bought(g.value, segments, floor, ranks);
  if (g.multiple_of > 1) {
    round_down(segments, floor, g.multiple_of, ranks);
    fill_residual(g, segments, ranks);
  }
  for (std::size_t l = 0; l < segments.size(); ++l) ranks[l] = segments[l].normalise(ranks[l]);
  return {std::move(ranks), threshold};
}

template RankPlan search_ranks(const Ranking<float>&);
template RankPlan search_ranks(const Ranking<double>&);

}  // namespace unirank
