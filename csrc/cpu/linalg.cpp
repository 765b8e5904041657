#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/blas.h"
#include "core/workspace.h"
#include "cpu/ops.h"
#include "operands.h"

namespace unirank::cpu {
namespace {

using i64 = std::int64_t;

// What became of one matrix: LAPACK's info, or this where the input or the result is not finite.
constexpr int kNotFinite = std::numeric_limits<int>::min();

void check_outcome(const char* op, const std::vector<int>& outcome) {
  for (std::size_t b = 0; b < outcome.size(); ++b) {
    check(outcome[b] != kNotFinite, op, ": matrix ", b, " of the batch is not finite");
    check(outcome[b] == 0, op, ": LAPACK did not converge on matrix ", b, " of the batch (info ", outcome[b], ")");
  }
}

template <typename T>
bool all_finite(const T* p, i64 n) {
  return std::all_of(p, p + n, [](T v) { return std::isfinite(v); });
}

// A workspace query answers in the matrix's own dtype, which rounds large lengths: never below the documented minimum.
template <typename T>
int work_length(T answer, i64 minimum) {
  return static_cast<int>(std::max<i64>(minimum, static_cast<i64>(answer)));
}

// Runs `make_solver()` once a thread (it owns the workspaces) and its result on every matrix. A matrix's bits depend
// on that matrix alone: it has one BLAS thread and workspaces of its own, whatever the batch and the thread count.
template <typename MakeSolver>
std::vector<int> for_each_matrix(i64 B, const MakeSolver& make_solver) {
  std::vector<int> outcome(static_cast<std::size_t>(B));
  torch::stable::parallel_for(0, B, 1, [&](i64 begin, i64 end) {
    const OneBlasThread one_thread;
    auto solve = make_solver();
    for (i64 b = begin; b < end; ++b) outcome[b] = solve(b);
  });
  return outcome;
}

// target [N, N] = sourceᵀ, in square tiles because one side always strides. With `lower`, of the tiles that touch the
// lower half of the source only.
template <typename T>
void transpose(const T* source, i64 N, T* target, bool lower) {
  constexpr i64 kTile = 16;
  for (i64 i0 = 0; i0 < N; i0 += kTile) {
    const i64 i1 = std::min(N, i0 + kTile);
    for (i64 j0 = 0; j0 < (lower ? i1 : N); j0 += kTile) {
      const i64 j1 = std::min(N, j0 + kTile);
      for (i64 i = i0; i < i1; ++i) {
        for (i64 j = j0; j < j1; ++j) target[j * N + i] = source[i * N + j];
      }
    }
  }
}

// Eigenpairs of one row-major matrix at a time. LAPACK reads columns, so the matrix goes in transposed; its upper
// half would need no transposition, but reducing that one loses digits on matrices graded from large to small.
template <typename T>
class EighSolver {
 public:
  explicit EighSolver(i64 N) : N_(static_cast<int>(N)), a_(N * N), w_(N) {
    T work = 0;
    int iwork = 0, query = -1, info = 0;
    blas<T>().syevd("V", "L", &N_, a_.data(), &N_, w_.data(), &work, &query, &iwork, &query, &info, 1, 1);
    work_.resize(work_length(work, 1 + 6 * N + 2 * N * N));
    iwork_.resize(std::max<i64>(iwork, 3 + 5 * N));
  }

  int operator()(const T* a, T* w, T* v) {
    for (i64 i = 0; i < N_; ++i) {
      if (!all_finite(a + i * N_, i + 1)) return kNotFinite;
    }
    transpose<T>(a, N_, a_.data(), true);
    const int lwork = static_cast<int>(work_.size()), liwork = static_cast<int>(iwork_.size());
    int info = 0;
    blas<T>().syevd("V", "L", &N_, a_.data(), &N_, w_.data(), work_.data(), &lwork, iwork_.data(), &liwork, &info, 1,
                    1);
    if (info != 0) return info;
    if (!all_finite(w_.data(), N_)) return kNotFinite;
    std::copy(w_.begin(), w_.end(), w);
    transpose<T>(a_.data(), N_, v, false);  // eigenvectors leave LAPACK as columns of a column-major matrix
    return 0;
  }

 private:
  int N_;
  Workspace<T> a_, w_, work_;
  Workspace<int> iwork_;
};

// Thin SVD of one row-major [M, N] matrix at a time. To LAPACK it is the column-major transpose Aᵀ = V S Uᵀ,
// so LAPACK's U is, read row-major, our Vh, and its VT our U: nothing is transposed.
template <typename T>
class SvdSolver {
 public:
  SvdSolver(i64 M, i64 N) : M_(static_cast<int>(M)), N_(static_cast<int>(N)), K_(std::min(M_, N_)) {
    const i64 K = K_;
    a_.resize(M * N);
    u_.resize(M * K);
    s_.resize(K);
    vh_.resize(K * N);
    iwork_.resize(8 * K);
    T work = 0;
    call(&work, -1);  // asks for the best workspace length
    work_.resize(work_length(work, 4 * K * K + 7 * K + std::max(M, N)));
  }

  int operator()(const T* a, T* u, T* s, T* vh) {
    if (!all_finite(a, static_cast<i64>(a_.size()))) return kNotFinite;
    std::copy(a, a + a_.size(), a_.begin());
    const int info = call(work_.data(), static_cast<int>(work_.size()));
    if (info != 0) return info;
    if (!all_finite(s_.data(), K_)) return kNotFinite;
    std::copy(u_.begin(), u_.end(), u);
    std::copy(s_.begin(), s_.end(), s);
    std::copy(vh_.begin(), vh_.end(), vh);
    return 0;
  }

 private:
  int call(T* work, int lwork) {
    int info = 0;
    blas<T>().gesdd("S", &N_, &M_, a_.data(), &N_, s_.data(), vh_.data(), &N_, u_.data(), &K_, work, &lwork,
                    iwork_.data(), &info, 1);
    return info;
  }

  int M_, N_, K_;
  Workspace<T> a_, u_, s_, vh_, work_;
  Workspace<int> iwork_;
};

template <typename T>
std::tuple<Tensor, Tensor> eigh(const Tensor& a) {
  const i64 B = a.size(0), N = a.size(1);
  Tensor w = torch::stable::new_empty(a, {B, N}), v = torch::stable::new_empty(a, {B, N, N});
  if (B == 0 || N == 0) return {w, v};
  const T* ap = static_cast<const T*>(a.const_data_ptr());
  T *wp = data<T>(w), *vp = data<T>(v);
  check_outcome("batched_eigh", for_each_matrix(B, [&] {
                  return [&, solve = EighSolver<T>(N)](i64 b) mutable {
                    return solve(ap + b * N * N, wp + b * N, vp + b * N * N);
                  };
                }));
  return {w, v};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> svd(const Tensor& a) {
  const i64 B = a.size(0), M = a.size(1), N = a.size(2), K = std::min(M, N);
  Tensor u = torch::stable::new_empty(a, {B, M, K}), s = torch::stable::new_empty(a, {B, K}),
         vh = torch::stable::new_empty(a, {B, K, N});
  if (B == 0 || K == 0) return {u, s, vh};
  const T* ap = static_cast<const T*>(a.const_data_ptr());
  T *up = data<T>(u), *sp = data<T>(s), *vp = data<T>(vh);
  check_outcome("batched_svd", for_each_matrix(B, [&] {
                  return [&, solve = SvdSolver<T>(M, N)](i64 b) mutable {
                    return solve(ap + b * M * N, up + b * M * K, sp + b * K, vp + b * K * N);
                  };
                }));
  return {u, s, vh};
}

}  // namespace

std::tuple<Tensor, Tensor> batched_eigh(Tensor a) {
  check_square_matrices("batched_eigh", a);
  a = torch::stable::contiguous(a);
  return a.scalar_type() == ScalarType::Double ? eigh<double>(a) : eigh<float>(a);
}

std::tuple<Tensor, Tensor, Tensor> batched_svd(Tensor a) {
  check_matrices("batched_svd", a);
  a = torch::stable::contiguous(a);
  return a.scalar_type() == ScalarType::Double ? svd<double>(a) : svd<float>(a);
}

}  // namespace unirank::cpu
