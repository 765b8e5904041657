// The SVD of the 64-bit API, which is told the dtypes: by polar decomposition (gesvdp).
#include "cusolver_svd.h"

using namespace mock::cusolver;

namespace {

constexpr const char* kRoutine = "cusolverDnXgesvdp";

struct Dtypes {
  cudaDataType a, s, u, v, compute;
  bool same() const { return a == s && a == u && a == v && a == compute && (a == CUDA_R_32F || a == CUDA_R_64F); }
};

template <typename T>
bool check_svd64(cusolverDnHandle_t handle, std::int64_t m, std::int64_t n, const void* a, std::int64_t lda,
                 const void* s, const void* u, std::int64_t ldu, const void* v, std::int64_t ldv) {
  return check_svd(kRoutine, handle, m, n, static_cast<const T*>(a), lda, static_cast<const T*>(s),
                   static_cast<const T*>(u), ldu, n, static_cast<const T*>(v), ldv, 1);
}

bool check_call(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz, int econ, Dtypes types,
                std::int64_t m, std::int64_t n, const void* a, std::int64_t lda, const void* s, const void* u,
                std::int64_t ldu, const void* v, std::int64_t ldv) {
  const auto check = types.a == CUDA_R_32F ? check_svd64<float> : check_svd64<double>;
  return expect(jobz == CUSOLVER_EIG_MODE_VECTOR && econ == 1, kRoutine, "mode") &&
         expect(types.same(), kRoutine, "dtypes") && expect(params, kRoutine, "no params") &&
         check(handle, m, n, a, lda, s, u, ldu, v, ldv);
}

template <typename T>
int solve(std::int64_t m, std::int64_t n, void* a, std::int64_t lda, void* s, void* u, std::int64_t ldu, void* v,
          std::int64_t ldv) {
  return svd_one(kRoutine, false, static_cast<int>(m), static_cast<int>(n), static_cast<T*>(a), static_cast<int>(lda),
                 static_cast<T*>(s), static_cast<T*>(u), static_cast<int>(ldu), static_cast<T*>(v),
                 static_cast<int>(ldv));
}

}  // namespace

extern "C" {

cusolverStatus_t CUSOLVERAPI cusolverDnXgesvdp_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                          cusolverEigMode_t jobz, int econ, int64_t m, int64_t n,
                                                          cudaDataType type_a, const void* a, int64_t lda,
                                                          cudaDataType type_s, const void* s, cudaDataType type_u,
                                                          const void* u, int64_t ldu, cudaDataType type_v,
                                                          const void* v, int64_t ldv, cudaDataType compute,
                                                          size_t* device, size_t* host) {
  if (const auto status = enter("cusolverDnXgesvdp_bufferSize")) return status;
  const Dtypes types{type_a, type_s, type_u, type_v, compute};
  if (!check_call(handle, params, jobz, econ, types, m, n, a, lda, s, u, ldu, v, ldv)) return kInvalid;
  const Query told = answer(kRoutine, join(type_a, m, n, lda, ldu, ldv), 4097 + 24 * n, 129 + n);
  *device = told.device;
  *host = told.host;
  return kSuccess;
}

cusolverStatus_t CUSOLVERAPI cusolverDnXgesvdp(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                               cusolverEigMode_t jobz, int econ, int64_t m, int64_t n,
                                               cudaDataType type_a, void* a, int64_t lda, cudaDataType type_s, void* s,
                                               cudaDataType type_u, void* u, int64_t ldu, cudaDataType type_v, void* v,
                                               int64_t ldv, cudaDataType compute, void* device, size_t device_bytes,
                                               void* host, size_t host_bytes, int* info, double* perturbation) {
  if (const auto status = enter(kRoutine)) return status;
  const Dtypes types{type_a, type_s, type_u, type_v, compute};
  if (!check_call(handle, params, jobz, econ, types, m, n, a, lda, s, u, ldu, v, ldv)) return kInvalid;
  if (!check_info(kRoutine, info, 1) || !expect(perturbation, kRoutine, "no place for the perturbation")) {
    return kInvalid;
  }
  const auto arguments = join(type_a, m, n, lda, ldu, ldv);
  if (const auto status = use_workspace(kRoutine, arguments, device, device_bytes, host, host_bytes)) return status;
  const auto found = state().perturbation.find(state().matrices[kRoutine]);
  const double value = found == state().perturbation.end() ? 0 : found->second;
  *info = (type_a == CUDA_R_32F ? solve<float> : solve<double>)(m, n, a, lda, s, u, ldu, v, ldv);
  state().pending.push_back([=] { *perturbation = value; });
  return kSuccess;
}

}  // extern "C"
