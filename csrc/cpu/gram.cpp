#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/blas.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/check.h"
#include "cpu/ops.h"

namespace unirank::cpu {
namespace {

using i64 = std::int64_t;

// Rows that one gemm sums in its own precision; across chunks the sum goes on in the gram's dtype.
constexpr i64 kChunk = 2048;
// Largest side of the square tiles of the lower half: small enough to share out, large enough for gemm at full speed.
constexpr i64 kMaxTile = 384;
// Columns of one piece of the column sums: a whole number of cache lines in every dtype.
constexpr i64 kColumns = 128;

// What gemm multiplies for an input dtype: fp64 for fp64, fp32 for everything shorter.
template <typename In>
using Compute = std::conditional_t<std::is_same_v<In, double>, double, float>;

// The counted rows of x, chunk by chunk, as a row-major matrix in the compute type.
template <typename In>
class Rows {
 public:
  using C = Compute<In>;

  Rows(const Tensor& x, const bool* mask) : x_(static_cast<const In*>(x.const_data_ptr())), N_(x.size(1)) {
    const i64 T = x.size(0);
    direct_ = std::is_same_v<In, C> && !mask && is_aligned(x_);
    if (mask) {
      for (i64 t = 0; t < T; ++t) {
        if (mask[t]) index_.push_back(t);
      }
    }
    masked_ = mask != nullptr;
    count_ = masked_ ? static_cast<i64>(index_.size()) : T;
    if (!direct_) buffer_.resize(static_cast<std::size_t>(std::min(kChunk, count_) * N_));
  }

  i64 count() const { return count_; }

  // Valid until the next call.
  const C* chunk(i64 begin, i64 end) {
    if constexpr (std::is_same_v<In, C>) {
      if (direct_) return x_ + begin * N_;
    }
    torch::stable::parallel_for(begin, end, 64, [&](i64 first, i64 last) {
      for (i64 t = first; t < last; ++t) {
        widen_row(x_ + (masked_ ? index_[t] : t) * N_, buffer_.data() + (t - begin) * N_, N_);
      }
    });
    return buffer_.data();
  }

 private:
  const In* x_;
  i64 N_, count_ = 0;
  bool direct_ = false, masked_ = false;
  std::vector<i64> index_;
  Workspace<C> buffer_;
};

// The lower half of an [N, N] matrix in square tiles of nearly equal size, a function of N alone: equal shares of work
// for any number of threads, and the same sums.
struct Tiles {
  i64 side;
  std::vector<std::pair<i64, i64>> corners;  // first row and first column of each

  explicit Tiles(i64 N) {
    // Three across give six tiles; the three tiles of two across would leave every other thread idle half the time.
    const i64 across = std::max<i64>(3, (N + kMaxTile - 1) / kMaxTile);
    side = ((N + across - 1) / across + 15) / 16 * 16;
    for (i64 i = 0; i < N; i += side) {
      for (i64 j = 0; j <= i; j += side) corners.emplace_back(i, j);
    }
  }
  i64 count() const { return static_cast<i64>(corners.size()); }
};

// product [m, n] = x[:, i:i+m]ᵀ x[:, j:j+n], row-major. To BLAS, x is the column-major [N, T] matrix.
template <typename C>
void tile_product(const C* x, i64 N, i64 rows, i64 i, i64 j, int m, int n, C* product) {
  const C one = 1, zero = 0;
  const int k = static_cast<int>(rows), ld = static_cast<int>(N);
  blas<C>().gemm("N", "T", &n, &m, &k, &one, x + j, &ld, x + i, &ld, &zero, product, &n, 1, 1);
}

template <typename C, typename Acc>
void add_lower_half(Acc* gram, const C* x, i64 N, i64 rows, const Tiles& tiles) {
  torch::stable::parallel_for(0, tiles.count(), 1, [&](i64 begin, i64 end) {
    const OneBlasThread one_thread;
    Workspace<C> product(static_cast<std::size_t>(tiles.side * tiles.side));
    for (i64 tile = begin; tile < end; ++tile) {
      const auto [i, j] = tiles.corners[tile];
      const i64 m = std::min(tiles.side, N - i), n = std::min(tiles.side, N - j);
      tile_product(x, N, rows, i, j, static_cast<int>(m), static_cast<int>(n), product.data());
      for (i64 r = 0; r < m; ++r) {
        Acc* target = gram + (i + r) * N + j;
        const i64 width = i == j ? r + 1 : n;  // a tile on the diagonal counts up to the diagonal
        for (i64 c = 0; c < width; ++c) target[c] += static_cast<Acc>(product[r * n + c]);
      }
    }
  });
}

template <typename Acc>
void mirror(Acc* gram, i64 N, const Tiles& tiles) {
  constexpr i64 kBlock = 16;  // both sides of a block stay in the first-level cache
  torch::stable::parallel_for(0, tiles.count(), 1, [&](i64 begin, i64 end) {
    for (i64 tile = begin; tile < end; ++tile) {
      const auto [i0, j0] = tiles.corners[tile];
      const i64 i1 = std::min(N, i0 + tiles.side), j1 = std::min(N, j0 + tiles.side);
      for (i64 ib = i0; ib < i1; ib += kBlock) {
        for (i64 jb = j0; jb < std::min(j1, ib + kBlock); jb += kBlock) {
          for (i64 i = ib; i < std::min(i1, ib + kBlock); ++i) {
            for (i64 j = jb; j < std::min({j1, jb + kBlock, i}); ++j) gram[j * N + i] = gram[i * N + j];
          }
        }
      }
    }
  });
}

template <typename C, typename Acc>
void add_column_sums(Acc* mean, const C* x, i64 N, i64 rows) {
  torch::stable::parallel_for(0, (N + kColumns - 1) / kColumns, 1, [&](i64 begin, i64 end) {
    for (i64 piece = begin; piece < end; ++piece) {
      const i64 first = piece * kColumns, width = std::min(kColumns, N - first);
      double sum[kColumns] = {};
      for (i64 t = 0; t < rows; ++t) {
        for (i64 c = 0; c < width; ++c) sum[c] += x[t * N + first + c];
      }
      for (i64 c = 0; c < width; ++c) mean[first + c] += static_cast<Acc>(sum[c]);
    }
  });
}

template <typename In, typename Acc>
void accumulate(const Tensor& gram, const Tensor& mean, const Tensor& x, const bool* mask) {
  const i64 N = x.size(1);
  Acc* g = static_cast<Acc*>(gram.mutable_data_ptr());
  Acc* m = static_cast<Acc*>(mean.mutable_data_ptr());
  Rows<In> source(x, mask);
  const Tiles tiles(N);
  for (i64 begin = 0; begin < source.count(); begin += kChunk) {
    const i64 end = std::min(begin + kChunk, source.count());
    const Compute<In>* rows = source.chunk(begin, end);
    add_column_sums(m, rows, N, end - begin);
    add_lower_half(g, rows, N, end - begin, tiles);
  }
  mirror(g, N, tiles);
}

template <typename In>
void accumulate(const Tensor& gram, const Tensor& mean, const Tensor& x, const bool* mask) {
  if (gram.scalar_type() == ScalarType::Double) return accumulate<In, double>(gram, mean, x, mask);
  return accumulate<In, float>(gram, mean, x, mask);
}

void check_arguments(const char* op, const Tensor& gram, const Tensor& mean, const Tensor& x) {
  check(x.dim() == 2, op, ": x must have shape [T, N], got ", shape(x));
  check(is_floating(x.scalar_type()), op, ": x must be float32, float64, bfloat16 or float16, got ",
        name(x.scalar_type()));
  const i64 N = x.size(1);
  check(N <= (1 << 30), op, ": N must fit a 32-bit BLAS, got ", N);
  check(gram.dim() == 2 && gram.size(0) == N && gram.size(1) == N && gram.is_contiguous(), op,
        ": gram must be contiguous of shape [", N, ", ", N, "], got ", shape(gram));
  check(mean.dim() == 1 && mean.size(0) == N && mean.is_contiguous(), op, ": mean must be contiguous of shape [", N,
        "], got ", shape(mean));
  check(is_full(gram.scalar_type()) && mean.scalar_type() == gram.scalar_type(), op,
        ": gram and mean must both be float64 or both float32, got ", name(gram.scalar_type()), " and ",
        name(mean.scalar_type()));
}

}  // namespace

void gram_accumulate_(Tensor gram, Tensor mean, Tensor x, std::optional<Tensor> mask) {
  const char* op = "gram_accumulate_";
  check_arguments(op, gram, mean, x);
  if (mask) mask = torch::stable::contiguous(*mask);
  const bool* counted = mask_data(op, mask, x.size(0));
  x = torch::stable::contiguous(x);
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return accumulate<double>(gram, mean, x, counted);
    case ScalarType::Float:
      return accumulate<float>(gram, mean, x, counted);
    case ScalarType::BFloat16:
      return accumulate<Bf16>(gram, mean, x, counted);
    default:
      return accumulate<Fp16>(gram, mean, x, counted);
  }
}

}  // namespace unirank::cpu
