// The mathematics of the mock, on column-major host matrices, by the LAPACK that torch carries.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/blas.h"

namespace mock {

template <typename T>
bool all_finite(const T* p, std::size_t n) {
  return std::all_of(p, p + n, [](T v) { return std::isfinite(v); });
}

// Overwrites a with its eigenvectors.
template <typename T>
int eigh(char uplo, int n, T* a, int lda, T* w) {
  T size = 0;
  int isize = 0, query = -1, info = 0;
  const auto syevd = unirank::blas<T>().syevd;
  syevd("V", &uplo, &n, a, &lda, w, &size, &query, &isize, &query, &info, 1, 1);
  std::vector<T> work(std::max<std::size_t>(size, 1 + 6 * n + 2 * n * n));
  std::vector<int> iwork(std::max(isize, 3 + 5 * n));
  const int lwork = static_cast<int>(work.size()), liwork = static_cast<int>(iwork.size());
  syevd("V", &uplo, &n, a, &lda, w, work.data(), &lwork, iwork.data(), &liwork, &info, 1, 1);
  return info;
}

// job 'S': u is m x n; job 'A': u is m x m. vt is n x n. For m >= n. Destroys a.
template <typename T>
int svd(char job, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* vt, int ldvt) {
  T size = 0;
  int query = -1, info = 0;
  std::vector<int> iwork(8 * n);
  const auto gesdd = unirank::blas<T>().gesdd;
  gesdd(&job, &m, &n, a, &lda, s, u, &ldu, vt, &ldvt, &size, &query, iwork.data(), &info, 1);
  std::vector<T> work(std::max<std::size_t>(size, 4 * n * n + 7 * n + m));
  const int lwork = static_cast<int>(work.size());
  gesdd(&job, &m, &n, a, &lda, s, u, &ldu, vt, &ldvt, work.data(), &lwork, iwork.data(), &info, 1);
  return info;
}

template <typename T>
void transpose(T* square, int n, int ld) {
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < j; ++i) std::swap(square[j * ld + i], square[i * ld + j]);
  }
}

}  // namespace mock
