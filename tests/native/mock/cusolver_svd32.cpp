// The SVDs of the 32-bit API, which has a function for each dtype: Jacobi for a batch.
#include "cusolver_svd.h"

using namespace mock::cusolver;

namespace {

template <typename T>
cusolverStatus_t gesvdj_size(cusolverDnHandle_t handle, int m, int n, const T* a, int lda, const T* s, const T* u,
                             int ldu, const T* v, int ldv, int* lwork, gesvdjInfo_t params, int batch,
                             const char* routine) {
  if (const auto status = enter(std::string(routine) + "_bufferSize")) return status;
  if (!check_svd(routine, handle, m, n, a, lda, s, u, ldu, m, v, ldv, batch)) return kInvalid;
  if (!expect(params, routine, "no Jacobi info")) return kInvalid;
  *lwork = static_cast<int>(answer(routine, join(dtype<T>(), m, n, lda, ldu, ldv, batch), 37 + m * n, 0).device);
  return kSuccess;
}

template <typename T>
cusolverStatus_t gesvdj_run(cusolverDnHandle_t handle, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, int ldv,
                            T* work, int lwork, int* info, gesvdjInfo_t params, int batch, const char* routine) {
  if (const auto status = enter(routine)) return status;
  if (!check_svd(routine, handle, m, n, a, lda, s, u, ldu, m, v, ldv, batch)) return kInvalid;
  if (!expect(params, routine, "no Jacobi info") || !check_info(routine, info, batch)) return kInvalid;
  // Lengths of this API count elements; the bytes are checked by touching them.
  if (static_cast<std::size_t>(lwork) < last_query(routine).device) return CUSOLVER_STATUS_INVALID_WORKSPACE;
  last_query(routine).device = static_cast<std::size_t>(lwork) * sizeof(T);
  if (const auto status = use_workspace(routine, join(dtype<T>(), m, n, lda, ldu, ldv, batch), work,
                                        static_cast<std::size_t>(lwork) * sizeof(T), nullptr, 0)) {
    return status;
  }
  last_query(routine).device = static_cast<std::size_t>(lwork);
  auto status = kSuccess;
  for (std::int64_t b = 0; b < batch; ++b) {
    info[b] = svd_one(routine, true, m, n, a + b * lda * n, lda, s + b * n, u + b * ldu * m, ldu, v + b * ldv * n, ldv,
                      false, status);
  }
  return status;
}

}  // namespace

extern "C" {

// The 32-bit API: one definition for each dtype, under one name in logs and faults.
#define MOCK_SVD_OF(LETTER, T)                                                                                       \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdjBatched_bufferSize(                                         \
      cusolverDnHandle_t handle, cusolverEigMode_t, int m, int n, const T* a, int lda, const T* s, const T* u,       \
      int ldu, const T* v, int ldv, int* lwork, gesvdjInfo_t params, int batch) {                                    \
    if (m > 32 || n > 32) return kInvalid;                                                                           \
    return gesvdj_size(handle, m, n, a, lda, s, u, ldu, v, ldv, lwork, params, batch, "cusolverDn*gesvdjBatched");   \
  }                                                                                                                  \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdjBatched(                                                    \
      cusolverDnHandle_t handle, cusolverEigMode_t, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, int ldv, \
      T* work, int lwork, int* info, gesvdjInfo_t params, int batch) {                                               \
    return gesvdj_run(handle, m, n, a, lda, s, u, ldu, v, ldv, work, lwork, info, params, batch,                     \
                      "cusolverDn*gesvdjBatched");                                                                   \
  }

MOCK_SVD_OF(S, float)
MOCK_SVD_OF(D, double)

}  // extern "C"
