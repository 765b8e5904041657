// The SVDs of the 64-bit API, which is told the dtypes: by polar decomposition (gesvdp), which gives V, and by QR
// iteration (gesvd), which gives Vᵀ.
#include "cusolver_svd.h"

using namespace mock::cusolver;

namespace {

constexpr const char* kPolar = "cusolverDnXgesvdp";
constexpr const char* kIteration = "cusolverDnXgesvd";

struct Dtypes {
  cudaDataType a, s, u, v, compute;
  bool same() const { return a == s && a == u && a == v && a == compute && (a == CUDA_R_32F || a == CUDA_R_64F); }
};

template <typename T>
bool check_svd64(const char* routine, cusolverDnHandle_t handle, std::int64_t m, std::int64_t n, const void* a,
                 std::int64_t lda, const void* s, const void* u, std::int64_t ldu, const void* v, std::int64_t ldv) {
  return check_svd(routine, handle, m, n, static_cast<const T*>(a), lda, static_cast<const T*>(s),
                   static_cast<const T*>(u), ldu, n, static_cast<const T*>(v), ldv, 1);
}

bool check_call(const char* routine, bool mode, cusolverDnHandle_t handle, cusolverDnParams_t params, Dtypes types,
                std::int64_t m, std::int64_t n, const void* a, std::int64_t lda, const void* s, const void* u,
                std::int64_t ldu, const void* v, std::int64_t ldv) {
  const auto check = types.a == CUDA_R_32F ? check_svd64<float> : check_svd64<double>;
  return expect(mode, routine, "mode") && expect(types.same(), routine, "dtypes") &&
         expect(params, routine, "no params") && check(routine, handle, m, n, a, lda, s, u, ldu, v, ldv);
}

template <typename T>
int solve(const char* routine, std::int64_t m, std::int64_t n, void* a, std::int64_t lda, void* s, void* u,
          std::int64_t ldu, void* v, std::int64_t ldv, bool rows, cusolverStatus_t& status) {
  return svd_one(routine, false, static_cast<int>(m), static_cast<int>(n), static_cast<T*>(a), static_cast<int>(lda),
                 static_cast<T*>(s), static_cast<T*>(u), static_cast<int>(ldu), static_cast<T*>(v),
                 static_cast<int>(ldv), rows, status);
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
  if (!check_call(kPolar, jobz == CUSOLVER_EIG_MODE_VECTOR && econ == 1, handle, params, types, m, n, a, lda, s, u, ldu,
                  v, ldv))
    return kInvalid;
  const Query told = answer(kPolar, join(type_a, m, n, lda, ldu, ldv), 4097 + 24 * n, 129 + n);
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
  if (const auto status = enter(kPolar)) return status;
  const Dtypes types{type_a, type_s, type_u, type_v, compute};
  if (!check_call(kPolar, jobz == CUSOLVER_EIG_MODE_VECTOR && econ == 1, handle, params, types, m, n, a, lda, s, u, ldu,
                  v, ldv))
    return kInvalid;
  if (!check_info(kPolar, info, 1) || !expect(perturbation, kPolar, "no place for the perturbation")) {
    return kInvalid;
  }
  const auto arguments = join(type_a, m, n, lda, ldu, ldv);
  if (const auto status = use_workspace(kPolar, arguments, device, device_bytes, host, host_bytes)) return status;
  const auto found = state().perturbation.find(state().matrices[kPolar]);
  const double value = found == state().perturbation.end() ? 0 : found->second;
  auto status = kSuccess;
  *info = (type_a == CUDA_R_32F ? solve<float> : solve<double>)(kPolar, m, n, a, lda, s, u, ldu, v, ldv, false, status);
  state().pending.push_back([=] { *perturbation = value; });
  return status;
}

cusolverStatus_t CUSOLVERAPI cusolverDnXgesvd_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                         signed char jobu, signed char jobvt, int64_t m, int64_t n,
                                                         cudaDataType type_a, const void* a, int64_t lda,
                                                         cudaDataType type_s, const void* s, cudaDataType type_u,
                                                         const void* u, int64_t ldu, cudaDataType type_vt,
                                                         const void* vt, int64_t ldvt, cudaDataType compute,
                                                         size_t* device, size_t* host) {
  if (const auto status = enter("cusolverDnXgesvd_bufferSize")) return status;
  const Dtypes types{type_a, type_s, type_u, type_vt, compute};
  const bool thin = jobu == 'S' && jobvt == 'S';
  if (!check_call(kIteration, thin, handle, params, types, m, n, a, lda, s, u, ldu, vt, ldvt)) return kInvalid;
  const Query told = answer(kIteration, join(type_a, m, n, lda, ldu, ldvt), 4097 + 40 * n, 65 + n);
  *device = told.device;
  *host = told.host;
  return kSuccess;
}

cusolverStatus_t CUSOLVERAPI cusolverDnXgesvd(cusolverDnHandle_t handle, cusolverDnParams_t params, signed char jobu,
                                              signed char jobvt, int64_t m, int64_t n, cudaDataType type_a, void* a,
                                              int64_t lda, cudaDataType type_s, void* s, cudaDataType type_u, void* u,
                                              int64_t ldu, cudaDataType type_vt, void* vt, int64_t ldvt,
                                              cudaDataType compute, void* device, size_t device_bytes, void* host,
                                              size_t host_bytes, int* info) {
  if (const auto status = enter(kIteration)) return status;
  const Dtypes types{type_a, type_s, type_u, type_vt, compute};
  const bool thin = jobu == 'S' && jobvt == 'S';
  if (!check_call(kIteration, thin, handle, params, types, m, n, a, lda, s, u, ldu, vt, ldvt)) return kInvalid;
  if (!check_info(kIteration, info, 1)) return kInvalid;
  const auto arguments = join(type_a, m, n, lda, ldu, ldvt);
  if (const auto status = use_workspace(kIteration, arguments, device, device_bytes, host, host_bytes)) return status;
  auto status = kSuccess;
  const auto run = type_a == CUDA_R_32F ? solve<float> : solve<double>;
  *info = run(kIteration, m, n, a, lda, s, u, ldu, vt, ldvt, true, status);
  return status;
}

}  // extern "C"
