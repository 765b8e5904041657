#include "core/moment.h"

#include <algorithm>

#include "core/lanes.h"

namespace unirank {
namespace {

using i64 = std::int64_t;

// Register blocking: a block of kRows x kWidth sums stays in registers while it runs down a panel. The panels hold
// kWidth columns each, row after row; the left factor is read from the same kind of panel, element by element.
template <typename C, int Bytes>
struct Blocking {
  static constexpr i64 kLanes = Bytes / static_cast<i64>(sizeof(C));
  static constexpr i64 kWidth = 2 * kLanes;
  static constexpr i64 kRows = Bytes == 64 ? 8 : 4;  // AVX-512 has 32 registers, the others 16
  static_assert(kMaxTile % kWidth == 0 && kWidth % kRows == 0);
};

// Columns first, first + 1, ... first + n - 1 of `depth` rows, widened, in panels; zeros fill the last panel.
template <int Bytes, typename In>
UNIRANK_INLINE void pack(const RowsOf<In>& rows, i64 begin, i64 depth, i64 first, i64 n, Compute<In>* panels) {
  using B = Blocking<Compute<In>, Bytes>;
  for (i64 t = 0; t < depth; ++t) {
    const In* source = rows.row(begin + t) + first;
    Compute<In>* target = panels + t * B::kWidth;
    for (i64 c = 0; c < n; c += B::kWidth, source += B::kWidth, target += depth * B::kWidth) {
      In tail[B::kWidth];
      const In* from = source;
      if (n - c < B::kWidth) {
        std::fill(std::copy(source, source + (n - c), tail), tail + B::kWidth, In{});
        from = tail;
      }
      for (i64 half = 0; half < 2; ++half) {
        const auto v = load_as<Bytes>(from + half * B::kLanes);
        std::memcpy(target + half * B::kLanes, &v, sizeof v);
      }
    }
  }
}

// out [kRows, kWidth] += leftᵀ right over `depth` rows.
template <int Bytes, typename C>
UNIRANK_INLINE void multiply_block(const C* left, const C* right, i64 depth, C* out) {
  using B = Blocking<C, Bytes>;
  Vector<C, Bytes> sum[B::kRows][2] = {};
  for (i64 t = 0; t < depth; ++t, left += B::kWidth, right += B::kWidth) {
    const auto right0 = load_as<Bytes>(right), right1 = load_as<Bytes>(right + B::kLanes);
#pragma GCC unroll 8
    for (i64 r = 0; r < B::kRows; ++r) {
      sum[r][0] += left[r] * right0;
      sum[r][1] += left[r] * right1;
    }
  }
#pragma GCC unroll 8
  for (i64 r = 0; r < B::kRows; ++r, out += kMaxTile) {
    sum[r][0] += load_as<Bytes>(out);
    sum[r][1] += load_as<Bytes>(out + B::kLanes);
    std::memcpy(out, sum[r], sizeof sum[r]);
  }
}

template <int Bytes, typename C>
UNIRANK_INLINE void add_column_sums(const C* panels, i64 depth, i64 n, double* sum) {
  constexpr i64 kWidth = Blocking<C, Bytes>::kWidth;
  for (i64 first = 0; first < n; first += kWidth, panels += depth * kWidth) {
    double part[kWidth] = {};
    for (i64 t = 0; t < depth; ++t) {
      for (i64 c = 0; c < kWidth; ++c) part[c] += panels[t * kWidth + c];
    }
    for (i64 c = 0; c < std::min(kWidth, n - first); ++c) sum[first + c] += part[c];
  }
}

struct TileMoment {
  template <int Bytes, typename In>
  static UNIRANK_INLINE void run(const RowsOf<In>* rows, i64 begin, i64 end, i64 i, i64 m, i64 j, i64 n,
                                 TileScratch<Compute<In>>* scratch, double* column_sum) {
    using B = Blocking<Compute<In>, Bytes>;
    const bool diagonal = i == j;
    auto *left = scratch->left.data(), *right = diagonal ? left : scratch->right.data();
    auto* product = scratch->product.data();
    std::fill(product, product + (m + B::kRows - 1) / B::kRows * B::kRows * kMaxTile, Compute<In>{0});
    for (i64 t = begin; t < end; t += kDepth) {
      const i64 depth = std::min(kDepth, end - t);
      pack<Bytes>(*rows, t, depth, i, m, left);
      if (diagonal) {
        add_column_sums<Bytes>(left, depth, m, column_sum);
      } else {
        pack<Bytes>(*rows, t, depth, j, n, right);
      }
      for (i64 c = 0; c < n; c += B::kWidth) {
        // Blocks that lie above the diagonal as a whole are left out.
        for (i64 r = diagonal ? c : 0; r < m; r += B::kRows) {
          const auto* rows_panel = left + r / B::kWidth * B::kWidth * depth + r % B::kWidth;
          multiply_block<Bytes>(rows_panel, right + c * depth, depth, product + r * kMaxTile + c);
        }
      }
    }
  }
};

}  // namespace

void tile_moment(const RowsOf<double>& rows, i64 begin, i64 end, i64 i, i64 m, i64 j, i64 n,
                 TileScratch<double>& scratch, double* column_sum) {
  dispatch<TileMoment>(&rows, begin, end, i, m, j, n, &scratch, column_sum);
}
void tile_moment(const RowsOf<float>& rows, i64 begin, i64 end, i64 i, i64 m, i64 j, i64 n, TileScratch<float>& scratch,
                 double* column_sum) {
  dispatch<TileMoment>(&rows, begin, end, i, m, j, n, &scratch, column_sum);
}
void tile_moment(const RowsOf<Bf16>& rows, i64 begin, i64 end, i64 i, i64 m, i64 j, i64 n, TileScratch<float>& scratch,
                 double* column_sum) {
  dispatch<TileMoment>(&rows, begin, end, i, m, j, n, &scratch, column_sum);
}
void tile_moment(const RowsOf<Fp16>& rows, i64 begin, i64 end, i64 i, i64 m, i64 j, i64 n, TileScratch<float>& scratch,
                 double* column_sum) {
  dispatch<TileMoment>(&rows, begin, end, i, m, j, n, &scratch, column_sum);
}

}  // namespace unirank
