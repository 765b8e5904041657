// Global ranking of all components and the exact budget search, on the device: the ranks are those of
// csrc/core/rank_search.cpp, to the integer.
//
// Every component is sorted by (score descending, index), the prices of the single steps are summed along that order,
// and what the budget affords is a prefix. All of it is integer arithmetic or comparison, so no order of threads shows.
// Memory path: sort and sum (CUB) move about 200 bytes a component; the kernels here stream once over sorted order and
// gather segments, of which there are few. The residual fill is one block and takes a reduction over the L segments
// for each step it buys or refuses, a few microseconds times a few L.
#pragma once

#include <type_traits>

#include "kernels/reduce.cuh"
#include "kernels/segments.cuh"

namespace unirank::kernels {

template <typename Score>
using SortKey = std::conditional_t<std::is_same_v<Score, double>, std::uint64_t, std::uint32_t>;

// Ascending keys are descending scores; equal scores, -0.0 and 0.0 among them, have equal keys.
template <typename Score>
__device__ SortKey<Score> sort_key(Score score) {
  using Key = SortKey<Score>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  if (score == 0) score = 0;
  Key bits;
  memcpy(&bits, &score, sizeof bits);
  return bits & kSign ? bits : ~(bits | kSign);
}

constexpr int kRankThreads = 256;

// Checks the segments, sets `status` up, and gives each segment its floor: min_rank rounded up. One block.
// registers: check_segments <= 64
template <typename Score>
__global__ void __launch_bounds__(kRankThreads, 4)
    check_segments(RankProblem<Score> p, RankStatus* status, i64* floor, i64* ranks) {
  if (threadIdx.x == 0) {
    *status = {kNone, kNone, kNone, kNone, kNone, kNone, kNone, 0, 0, 0};
    if (p.offsets[0] != 0 || p.offsets[p.L] != p.C) status->bad_ends = 0;
  }
  __syncthreads();
  for (i64 l = threadIdx.x; l < p.L; l += kRankThreads) {
    const i64 cost = p.cost[l], dense = p.dense_cost[l];
    const bool increases = p.offsets[l] < p.offsets[l + 1];
    if (!increases) atomic_min(&status->bad_segment, l);
    if (cost <= 0) atomic_min(&status->bad_cost, l);
    if (dense <= 0) atomic_min(&status->bad_dense, l);
    if (!increases || cost <= 0 || dense <= 0) continue;
    const Segment s = segment_at(p, l);
    if (p.pivoted && cost / 2 < s.K) {
      atomic_min(&status->bad_pivoted, l);
      continue;
    }
    const i64 wanted = p.min_rank < s.K ? p.min_rank : s.K;
    floor[l] = ranks[l] = s.normalise(s.round_up(wanted, p.multiple_of));
    atomicAdd(&status->dense_high, static_cast<unsigned long long>(dense) >> 32);
    atomicAdd(&status->dense_low, static_cast<unsigned long long>(dense) & 0xffffffffull);
    atomicAdd(&status->floor_total, static_cast<unsigned long long>(s.price(floor[l])));
  }
}

// The key and the index of every component, and the check of its score.
// registers: make_keys <= 64
template <typename Score>
__global__ void __launch_bounds__(kRankThreads, 4)
    make_keys(RankProblem<Score> p, RankStatus* status, SortKey<Score>* keys, std::int32_t* index) {
  const i64 c = static_cast<i64>(blockIdx.x) * kRankThreads + threadIdx.x;
  if (c >= p.C) return;
  const Score score = p.value[c];
  keys[c] = sort_key(score);
  index[c] = static_cast<std::int32_t>(c);
  if (!isfinite(score)) atomic_min(&status->bad_value, c);
  if (c > 0 && score > p.value[c - 1] && p.offsets[segment_of(p, c)] != c) atomic_min(&status->rise, c);
}

// steps[i] = what the component in place i of the order adds to the price of its segment, beyond the floor.
// registers: price_steps <= 64
template <typename Score>
__global__ void __launch_bounds__(kRankThreads, 4)
    price_steps(RankProblem<Score> p, const RankStatus* status, const std::int32_t* __restrict__ order,
                const i64* __restrict__ floor, i64* __restrict__ steps) {
  const i64 i = static_cast<i64>(blockIdx.x) * kRankThreads + threadIdx.x;
  if (i >= p.C) return;
  steps[i] = 0;
  if (!status->segments_are_valid()) return;
  const i64 l = segment_of(p, order[i]);
  const Segment s = segment_at(p, l);
  const i64 r = order[i] - s.begin;
  if (r >= floor[l]) steps[i] = s.step(r, r + 1);
}

// Raises ranks from the floor to the longest affordable prefix. `spent` is the inclusive sum of the steps. Scores do
// not rise inside a segment, so its components come in their own order and the last one bought is its rank.
//
// registers: buy_prefix <= 64
template <typename Score>
__global__ void __launch_bounds__(kRankThreads, 4)
    buy_prefix(RankProblem<Score> p, const RankStatus* status, const std::int32_t* __restrict__ order,
               const i64* __restrict__ spent, i64* ranks) {
  const i64 i = static_cast<i64>(blockIdx.x) * kRankThreads + threadIdx.x;
  if (i >= p.C || !status->segments_are_valid()) return;
  if (spent[i] > p.budget - static_cast<i64>(status->floor_total)) return;
  const i64 l = segment_of(p, order[i]);
  atomic_max(&ranks[l], order[i] - p.offsets[l] + 1);  // below the floor this changes nothing
}

struct Smaller {
  __device__ double operator()(double a, double b) const { return b < a ? b : a; }
};

struct AddPrices {
  __device__ i64 operator()(i64 a, i64 b) const { return a + b; }
};

// A segment with the score of its next component.
struct Next {
  double score;
  i64 l;
};

__device__ __forceinline__ Next shuffle_xor(const Next& n, int distance) {
  return {shuffle_xor(n.score, distance), shuffle_xor(n.l, distance)};
}

struct Better {
  __device__ Next operator()(const Next& a, const Next& b) const {
    const bool second = a.score != b.score ? b.score > a.score : b.l < a.l;
    return second ? b : a;
  }
};

constexpr int kRankWarps = kRankThreads / kWarp;

// What rounding down freed is spent again in score order. A segment's next component is always the one at its rank, so
// the best of one candidate a segment visits the components in the order of the whole walk. Called by a whole block.
template <typename Score>
__device__ void fill_residual(const RankProblem<Score>& p, double* next, i64* ranks, i64 left) {
  UNIRANK_SHARED(Next, scratch, kRankWarps);
  const auto next_score = [&p](const Segment& s, i64 r) {
    return r < s.K ? static_cast<double>(p.value[s.begin + r]) : -kInfinity;
  };
  for (i64 l = threadIdx.x; l < p.L; l += kRankThreads) next[l] = next_score(segment_at(p, l), ranks[l]);
  while (true) {
    Next best{-kInfinity, p.L};
    // Thread 0 writes any segment's candidate: a barrier stands between that and every reading.
    for (i64 l = threadIdx.x; l < p.L; l += kRankThreads) best = Better{}(best, {next[l], l});
    best = block_reduce<kRankWarps>(best, scratch, Better{});
    if (best.score == -kInfinity) return;
    if (threadIdx.x == 0) {
      const Segment s = segment_at(p, best.l);
      const i64 r = ranks[best.l], target = s.normalise(s.round_up(r + 1, p.multiple_of));
      const i64 step = s.step(r, target);
      if (step <= left) {
        left -= step;
        ranks[best.l] = target;
        next[best.l] = next_score(s, target);
      } else {
        next[best.l] = -kInfinity;  // closed: no later, cheaper multiple of this segment is bought either
      }
    }
    __syncthreads();
  }
}

// threshold = smallest score bought beyond the floor; then multiples, residual, and dense ranks as K. One block.
// registers: settle_ranks <= 64
template <typename Score>
__global__ void __launch_bounds__(kRankThreads, 4)
    settle_ranks(RankProblem<Score> p, const RankStatus* status, const i64* __restrict__ floor, double* next,
                 i64* ranks, double* threshold) {
  if (!status->segments_are_valid()) return;
  UNIRANK_SHARED(double, smallest_scratch, kRankWarps);
  UNIRANK_SHARED(i64, price_scratch, kRankWarps);
  double smallest = kInfinity;
  i64 used = 0;
  for (i64 l = threadIdx.x; l < p.L; l += kRankThreads) {
    const Segment s = segment_at(p, l);
    i64 r = ranks[l];
    if (r > floor[l]) smallest = Smaller{}(smallest, static_cast<double>(p.value[s.begin + r - 1]));
    if (!s.is_dense(r)) {
      const i64 rounded = r / p.multiple_of * p.multiple_of;
      r = rounded < floor[l] ? floor[l] : rounded;
    }
    ranks[l] = r;
    used += s.price(r);
  }
  smallest = block_reduce<kRankWarps>(smallest, smallest_scratch, Smaller{});
  used = block_reduce<kRankWarps>(used, price_scratch, AddPrices{});
  if (threadIdx.x == 0) *threshold = smallest + 0.0;  // -0.0 becomes 0.0: equal scores give equal bits
  if (p.multiple_of > 1) fill_residual(p, next, ranks, p.budget - used);
  for (i64 l = threadIdx.x; l < p.L; l += kRankThreads) ranks[l] = segment_at(p, l).normalise(ranks[l]);
}

template <typename Score>
struct RankScratch {
  SortKey<Score>*keys, *sorted_keys;  // [C]
  std::int32_t *index, *order;        // [C]
  i64 *steps, *spent;                 // [C]
  i64* floor;                         // [L]
  double* next;                       // [L]
  RankStatus* status;
};

// Host side, the whole op, for C < 2^31; `launch` skips empty grids. `sort(keys, sorted_keys, index, order, C)` queues
// a stable ascending sort of pairs, `add_up(steps, spent, C)` an inclusive sum. The results hold if `status` names no
// fault.
template <typename Score, typename Launch, typename Sort, typename AddUp>
void search_ranks(const Launch& launch, const Sort& sort, const AddUp& add_up, const RankProblem<Score>& p,
                  const RankScratch<Score>& s, i64* ranks, double* threshold) {
  const dim3 block(kRankThreads), one(1), components(blocks_for(p.C, kRankThreads));
  launch(check_segments<Score>, one, block, p, s.status, s.floor, ranks);
  launch(make_keys<Score>, components, block, p, s.status, s.keys, s.index);
  sort(s.keys, s.sorted_keys, s.index, s.order, p.C);
  launch(price_steps<Score>, components, block, p, s.status, s.order, s.floor, s.steps);
  add_up(s.steps, s.spent, p.C);
  launch(buy_prefix<Score>, components, block, p, s.status, s.order, s.spent, ranks);
  launch(settle_ranks<Score>, one, block, p, s.status, s.floor, s.next, ranks, threshold);
}

}  // namespace unirank::kernels
