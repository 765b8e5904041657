// The ranking problem of global_topk on the device: segments, their prices, and what was found wrong with them.
#pragma once

#include "kernels/platform.cuh"

namespace unirank::kernels {

// L segments of components, one per linear. Pointers are to device memory.
template <typename Score>
struct RankProblem {
  const Score* value;     // [C]
  const i64* cost;        // [L] M + N
  const i64* dense_cost;  // [L] price of the dense matrix
  const i64* offsets;     // [L + 1]
  i64 C, L;
  i64 budget, min_rank, multiple_of;
  bool pivoted;  // rank r costs r * (cost - r), else r * cost; at most dense_cost either way
};

constexpr i64 kNone = std::numeric_limits<i64>::max();

// Filled in by the kernels, read once by the host. Indices are the first offending ones, kNone for none.
struct RankStatus {
  i64 bad_ends;                              // 0 where offsets do not run from 0 to C
  i64 bad_segment;                           // segment that does not increase
  i64 bad_cost, bad_dense;                   // segment whose price is not positive
  i64 bad_pivoted;                           // segment too long for its cost, where pivoted
  i64 bad_value;                             // component that is not finite
  i64 rise;                                  // component with a larger score than the one before it in its segment
  unsigned long long dense_high, dense_low;  // halves of the sum of the dense costs, which may not fit 64 bits
  unsigned long long floor_total;            // price of the ranks that every segment gets first

  __host__ __device__ bool dense_overflows() const { return (dense_high + (dense_low >> 32)) >> 31 != 0; }
  // Without valid segments no index into them is safe, and sums of prices may wrap around.
  __host__ __device__ bool segments_are_valid() const {
    return bad_ends == kNone && bad_segment == kNone && bad_cost == kNone && bad_dense == kNone &&
           bad_pivoted == kNone && !dense_overflows();
  }
};

// "Rank r" costs min(r * unit(r), dense_cost), without ever forming a product that overflows. Pivoted storage leaves
// out the r * r numbers of an identity; with K <= cost / 2, as here, a larger rank still costs more.
struct Segment {
  i64 begin, K, cost, dense_cost;
  bool pivoted;

  __device__ i64 unit(i64 r) const { return pivoted ? cost - r : cost; }
  __device__ bool is_dense(i64 r) const { return r > (dense_cost - 1) / unit(r); }
  __device__ i64 price(i64 r) const { return is_dense(r) ? dense_cost : r * unit(r); }
  // What a larger rank costs more than r, mostly in one division (a hundred instructions): what is below a rank that is
  // not dense is not dense either.
  __device__ i64 step(i64 r, i64 target) const {
    return is_dense(target) ? dense_cost - price(r) : target * unit(target) - r * unit(r);
  }
  __device__ i64 normalise(i64 r) const { return is_dense(r) ? K : r; }

  __device__ i64 round_up(i64 r, i64 multiple_of) const {
    if (r >= K || multiple_of > K) return r == 0 ? 0 : K;
    const i64 rounded = (r + multiple_of - 1) / multiple_of * multiple_of;
    return rounded > K ? K : rounded;
  }
};

template <typename Score>
__device__ Segment segment_at(const RankProblem<Score>& p, i64 l) {
  const i64 begin = p.offsets[l];
  return {begin, p.offsets[l + 1] - begin, p.cost[l], p.dense_cost[l], p.pivoted};
}

// The segment that component c lies in; ends also when offsets are not sorted.
template <typename Score>
__device__ i64 segment_of(const RankProblem<Score>& p, i64 c) {
  i64 low = 0, high = p.L - 1;
  while (low < high) {
    const i64 middle = low + (high - low + 1) / 2;
    if (p.offsets[middle] <= c) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Integers of the machine's widths under the names that atomics want.
__device__ inline void atomic_min(i64* target, i64 v) {
  atomicMin(reinterpret_cast<long long*>(target), static_cast<long long>(v));
}
__device__ inline void atomic_max(i64* target, i64 v) {
  atomicMax(reinterpret_cast<long long*>(target), static_cast<long long>(v));
}

}  // namespace unirank::kernels
