// What every SVD of the mock shares: the checks of its operands, and the decomposition of one matrix.
#pragma once

#include "cusolver.h"
#include "lapack.h"

namespace mock::cusolver {

// One SVD with m >= n, left vectors m x (full ? m : n), right ones as columns, or as rows where `rows`. The input is
// destroyed, as cuSOLVER's may be. `status` is set where the input is not finite.
template <typename T>
int svd_one(const std::string& routine, bool full, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, int ldv,
            bool rows, cusolverStatus_t& status) {
  int info = state().info_on_nan;
  if (mock::all_finite(a, static_cast<std::size_t>(lda) * n)) {
    info = mock::svd(full ? 'A' : 'S', m, n, a, lda, s, u, ldu, v, ldv);
    if (!rows) mock::transpose(v, n, ldv);
  } else {
    fill_nan(s, n);
    status = static_cast<cusolverStatus_t>(state().status_on_nan);
  }
  fill_nan(a, static_cast<std::size_t>(lda) * n);
  return outcome(routine, info, s, n);
}

template <typename T>
bool check_svd(const std::string& routine, cusolverDnHandle_t handle, std::int64_t m, std::int64_t n, const T* a,
               std::int64_t lda, const T* s, const T* u, std::int64_t ldu, std::int64_t u_columns, const T* v,
               std::int64_t ldv, std::int64_t batch) {
  const auto bytes = [&](std::int64_t count) { return static_cast<std::size_t>(count * batch) * sizeof(T); };
  return is_ready(routine, handle) && expect(m >= n && n >= 1 && batch >= 1, routine, "shape") &&
         expect(lda >= m && ldu >= m && ldv >= n, routine, "leading dimension") &&
         expect(on_device(a, bytes(lda * n)), routine, "a is out of bounds") &&
         expect(on_device(s, bytes(n)), routine, "s is out of bounds") &&
         expect(on_device(u, bytes(ldu * u_columns)), routine, "u is out of bounds") &&
         expect(on_device(v, bytes(ldv * n)), routine, "v is out of bounds");
}

}  // namespace mock::cusolver
