// One tile of the second moment Xᵀ X of a row-major X [T, N], free of torch and of any BLAS.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/rows.h"
#include "core/workspace.h"

namespace unirank {

// What is multiplied for an input dtype: fp64 for fp64, fp32 for everything shorter.
template <typename In>
using Compute = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Largest side of a square tile: its product and the packed columns fit a second-level cache of 1 MB.
inline constexpr std::int64_t kMaxTile = 256;
// Rows packed, and summed in registers, at a time: two panels of them fit the first-level cache.
inline constexpr std::int64_t kDepth = 128;

template <typename In>
struct RowsOf {
  const In* x;
  std::int64_t N;

  const In* row(std::int64_t t) const { return x + t * N; }
};

// Scratch of one thread.
template <typename C>
struct TileScratch {
  Workspace<C> left = Workspace<C>(kMaxTile * kDepth), right = Workspace<C>(kMaxTile * kDepth);
  Workspace<C> product = Workspace<C>(kMaxTile * kMaxTile);  // [kMaxTile, kMaxTile]
};

// scratch.product [m, n] = Σ_t x_t[i:i+m] x_t[j:j+n]ᵀ over the rows begin <= t < end, with m, n <= kMaxTile.
// Each element is a sum of chains of kDepth multiply-adds, in the order of t: short chains keep the rounding small, and
// the bits depend neither on the tile nor on the threads.
// On the diagonal (i = j, m = n) only the lower half is meant, and the columns' sums are added to column_sum [m].
void tile_moment(const RowsOf<double>&, std::int64_t begin, std::int64_t end, std::int64_t i, std::int64_t m,
                 std::int64_t j, std::int64_t n, TileScratch<double>&, double* column_sum);
void tile_moment(const RowsOf<float>&, std::int64_t begin, std::int64_t end, std::int64_t i, std::int64_t m,
                 std::int64_t j, std::int64_t n, TileScratch<float>&, double* column_sum);
void tile_moment(const RowsOf<Bf16>&, std::int64_t begin, std::int64_t end, std::int64_t i, std::int64_t m,
                 std::int64_t j, std::int64_t n, TileScratch<float>&, double* column_sum);
void tile_moment(const RowsOf<Fp16>&, std::int64_t begin, std::int64_t end, std::int64_t i, std::int64_t m,
                 std::int64_t j, std::int64_t n, TileScratch<float>&, double* column_sum);

}  // namespace unirank
