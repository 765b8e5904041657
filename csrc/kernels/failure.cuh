// Host side: what the kernels of global_topk found wrong, in the words of the CPU op.
#pragma once

#include <string>

#include "kernels/segments.cuh"

namespace unirank::kernels {

// Empty where nothing is wrong. read(pointer) fetches one value from the device; it is called only to fill in a
// message.
template <typename Score, typename Read>
std::string failure_message(const RankStatus& status, const RankProblem<Score>& p, const Read& read) {
  const auto text = [](auto v) { return std::to_string(v); };
  const auto price = [&](const char* name, const i64* prices, i64 l) {
    return std::string(name) + " must be positive, got " + text(read(prices + l)) + " at segment " + text(l);
  };
  if (status.bad_ends != kNone) {
    return "offsets must run from 0 to " + text(p.C) + ", got " + text(read(p.offsets)) + " to " +
           text(read(p.offsets + p.L));
  }
  if (const i64 l = status.bad_segment; l != kNone) {
    return "offsets must increase, but segment " + text(l) + " runs from " + text(read(p.offsets + l)) + " to " +
           text(read(p.offsets + l + 1));
  }
  if (status.bad_cost != kNone) return price("cost", p.cost, status.bad_cost);
  if (status.bad_dense != kNone) return price("dense_cost", p.dense_cost, status.bad_dense);
  if (const i64 l = status.bad_pivoted; l != kNone) {
    return "with pivoted=True, cost must be at least twice a segment's length, got cost " + text(read(p.cost + l)) +
           " and length " + text(read(p.offsets + l + 1) - read(p.offsets + l)) + " at segment " + text(l);
  }
  if (status.dense_overflows()) return "the dense costs add up to more than an int64";
  if (const i64 c = status.bad_value; c != kNone) {
    return "value must be finite, got " + text(read(p.value + c)) + " at index " + text(c);
  }
  if (status.rise != kNone) {
    i64 l = 0;
    while (read(p.offsets + l + 1) <= status.rise) ++l;
    return "value must be non-increasing inside a segment, but rises at index " + text(status.rise) + " in segment " +
           text(l);
  }
  if (const i64 floor = static_cast<i64>(status.floor_total); floor > p.budget) {
    return "min_rank " + text(p.min_rank) + " needs " + text(floor) + " parameters but the budget is " + text(p.budget);
  }
  return {};
}

}  // namespace unirank::kernels
