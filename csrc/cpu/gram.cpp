#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "core/moment.h"
#include "cpu/ops.h"
#include "operands.h"

namespace unirank::cpu {
namespace {

using i64 = std::int64_t;

// Rows that are summed in the compute type; across chunks the sum goes on in the gram's dtype.
constexpr i64 kChunk = 2048;

// The lower half of an [N, N] matrix in square tiles of nearly equal size. The tiles on the diagonal, half the work,
// come last: threads take the next tile when they are free, and small pieces at the end finish together.
struct Tiles {
  i64 side;
  std::vector<std::pair<i64, i64>> corners;  // first row and first column of each

  explicit Tiles(i64 N) {
    const i64 across = std::max<i64>(3, (N + kMaxTile - 1) / kMaxTile);  // fewer would not feed several threads
    side = ((N + across - 1) / across + 31) / 32 * 32;
    for (i64 i = 0; i < N; i += side) {
      for (i64 j = 0; j < i; j += side) corners.emplace_back(i, j);
    }
    for (i64 i = 0; i < N; i += side) corners.emplace_back(i, i);
  }
  i64 count() const { return static_cast<i64>(corners.size()); }
};

// Adds the tile's product to the gram; on the diagonal up to the diagonal.
template <typename C, typename Acc>
void add_tile(const C* product, Acc* gram, i64 N, i64 i, i64 m, i64 j, i64 n) {
  for (i64 r = 0; r < m; ++r) {
    Acc* target = gram + (i + r) * N + j;
    const i64 width = i == j ? r + 1 : n;
    for (i64 c = 0; c < width; ++c) target[c] += static_cast<Acc>(product[r * kMaxTile + c]);
  }
}

template <typename Acc>
void mirror_tile(Acc* gram, i64 N, i64 i0, i64 m, i64 j0, i64 n) {
  constexpr i64 kBlock = 16;  // both sides of a block stay in the first-level cache
  const i64 i1 = i0 + m, j1 = j0 + n;
  for (i64 ib = i0; ib < i1; ib += kBlock) {
    for (i64 jb = j0; jb < std::min(j1, ib + kBlock); jb += kBlock) {
      for (i64 i = ib; i < std::min(i1, ib + kBlock); ++i) {
        for (i64 j = jb; j < std::min({j1, jb + kBlock, i}); ++j) gram[j * N + i] = gram[i * N + j];
      }
    }
  }
}

template <typename In, typename Acc>
void accumulate(const Tensor& gram, const Tensor& mean, const Tensor& x) {
  const i64 T = x.size(0), N = x.size(1);
  Acc* g = data<Acc>(gram);
  Acc* sums = data<Acc>(mean);
  if (T == 0) return;
  const RowsOf<In> rows{const_data<In>(x), N};
  const Tiles tiles(N);
  std::atomic<i64> next = 0;
  // The ranges that parallel_for hands out only say how many threads take part.
  torch::stable::parallel_for(0, tiles.count(), 1, [&](i64, i64) {
    TileScratch<Compute<In>> scratch;
    for (i64 tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < tiles.count();) {
      const auto [i, j] = tiles.corners[tile];
      const i64 m = std::min(tiles.side, N - i), n = std::min(tiles.side, N - j);
      for (i64 begin = 0; begin < T; begin += kChunk) {
        double column_sum[kMaxTile] = {};
        tile_moment(rows, begin, std::min(begin + kChunk, T), i, m, j, n, scratch, column_sum);
        add_tile(scratch.product.data(), g, N, i, m, j, n);
        if (i != j) continue;
        for (i64 c = 0; c < m; ++c) sums[i + c] += static_cast<Acc>(column_sum[c]);
      }
      mirror_tile(g, N, i, m, j, n);
    }
  });
}

template <typename In>
void accumulate(const Tensor& gram, const Tensor& mean, const Tensor& x) {
  if (gram.scalar_type() == ScalarType::Double) return accumulate<In, double>(gram, mean, x);
  return accumulate<In, float>(gram, mean, x);
}

}  // namespace

void gram_accumulate_(Tensor gram, Tensor mean, Tensor x) {
  const char* op = "gram_accumulate_";
  check_tokens(op, x);
  check_moments(op, gram, mean, x.size(1));
  x = torch::stable::contiguous(x);
  with_element_type<Bf16, Fp16>(x.scalar_type(), [&]<typename In>() { accumulate<In>(gram, mean, x); });
}

}  // namespace unirank::cpu
