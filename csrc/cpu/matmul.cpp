#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "core/blas.h"
#include "cpu/ops.h"
#include "operands.h"

namespace unirank::cpu {
namespace {

using i64 = std::int64_t;

// Rows and columns of the output that one call of the BLAS makes (choice). Part of the result's bits: a BLAS may take
// another kernel for another size.
constexpr i64 kTile = 192;
// Multiplications below which a second thread is not worth waking (choice); bits do not follow it.
constexpr i64 kThread = 1 << 20;

// Matrices [B, R, C] of which either rows or columns have neighbours beside each other in memory.
template <typename T>
struct Matrices {
  const T* start;
  i64 batch, row, column;  // strides

  Matrices(const char* name, const Tensor& t)
      : start(static_cast<const T*>(t.const_data_ptr())), batch(t.stride(0)), row(t.stride(1)), column(t.stride(2)) {
    // A stride along one element is never used, and torch gives it any number.
    if (t.size(1) == 1 && column == 1) row = t.size(2);
    if (t.size(2) == 1 && row == 1) column = t.size(1);
    const bool rows = column == 1 && row >= std::max<i64>(1, t.size(2));
    const bool columns = row == 1 && column >= std::max<i64>(1, t.size(1));
    check(rows || columns, "matmul_: ", name, " must have rows or columns without gaps");
    by_rows = rows;
    check(lead() <= std::numeric_limits<int>::max(), "matmul_: ", name, " is too large for this BLAS");
  }

  bool by_rows;
  i64 lead() const { return std::max<i64>(1, by_rows ? row : column); }
};

template <typename T>
void multiply(Tensor& out, const Tensor& a, const Tensor& b, T alpha, T beta) {
  const i64 B = a.size(0), M = a.size(1), K = a.size(2), N = b.size(2);
  if (B == 0 || M == 0 || N == 0) return;
  const Matrices<T> left("a", a), right("b", b);
  check(std::max(K, N) <= std::numeric_limits<int>::max(), "matmul_: a product is too large for this BLAS");
  T* target = data<T>(out);
  const i64 down = (M + kTile - 1) / kTile, across = (N + kTile - 1) / kTile;
  const i64 tiles = B * down * across, of_a_tile = std::max<i64>(1, std::min(M, kTile) * std::min(N, kTile) * K);
  torch::stable::parallel_for(0, tiles, std::max<i64>(1, kThread / of_a_tile), [&](i64 begin, i64 end) {
    const OneBlasThread one_thread;
    // Row-major to us is the transpose to a BLAS: outᵀ = bᵀ aᵀ, and what is stored by rows goes in as it is.
    const char *of_b = right.by_rows ? "N" : "T", *of_a = left.by_rows ? "N" : "T";
    const int k = static_cast<int>(K), ldb = static_cast<int>(right.lead()), lda = static_cast<int>(left.lead()),
              ldo = static_cast<int>(N);
    for (i64 tile = begin; tile < end; ++tile) {
      const i64 batch = tile / (down * across), i = tile / across % down * kTile, j = tile % across * kTile;
      const int m = static_cast<int>(std::min(kTile, M - i)), n = static_cast<int>(std::min(kTile, N - j));
      blas<T>().gemm(of_b, of_a, &n, &m, &k, &alpha, right.start + batch * right.batch + j * right.column, &ldb,
                     left.start + batch * left.batch + i * left.row, &lda, &beta, target + (batch * M + i) * N + j,
                     &ldo, 1, 1);
    }
  });
}

}  // namespace

void matmul_(Tensor out, Tensor a, Tensor b, double alpha, double beta) {
  check_matmul("matmul_", out, a, b);
  if (out.scalar_type() == ScalarType::Double) return multiply<double>(out, a, b, alpha, beta);
  multiply<float>(out, a, b, static_cast<float>(alpha), static_cast<float>(beta));
}

}  // namespace unirank::cpu
