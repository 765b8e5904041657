// The SVDs of the 64-bit API, which is told the dtypes: by polar decomposition (gesvdp) and by QR (gesvd).
#include "cusolver_svd.h"

using namespace mock::cusolver;

namespace {

// The 64-bit SVDs share all but their tails.
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

cusolverStatus_t size64(const char* routine, cusolverDnHandle_t handle, cusolverDnParams_t params, Dtypes types,
                        std::int64_t m, std::int64_t n, const void* a, std::int64_t lda, const void* s, const void* u,
                        std::int64_t ldu, const void* v, std::int64_t ldv, std::size_t* device, std::size_t* host) {
  if (const auto status = enter(std::string(routine) + "_bufferSize")) return status;
  if (!expect(types.same(), routine, "dtypes") || !expect(params, routine, "no params")) return kInvalid;
  const auto check = types.a == CUDA_R_32F ? check_svd64<float> : check_svd64<double>;
  if (!check(routine, handle, m, n, a, lda, s, u, ldu, v, ldv)) return kInvalid;
  const Query told = answer(routine, join(types.a, m, n, lda, ldu, ldv), 4097 + 24 * n, 129 + n);
  *device = told.device;
  *host = told.host;
  return kSuccess;
}

template <typename T>
cusolverStatus_t run64(const char* routine, Right layout, cusolverDnHandle_t handle, cusolverDnParams_t params,
                       Dtypes types, std::int64_t m, std::int64_t n, void* a, std::int64_t lda, void* s, void* u,
                       std::int64_t ldu, void* v, std::int64_t ldv, void* device, std::size_t device_bytes, void* host,
                       std::size_t host_bytes, int* info) {
  if (const auto status = enter(routine)) return status;
  if (!expect(types.same(), routine, "dtypes") || !expect(params, routine, "no params")) return kInvalid;
  if (!check_svd64<T>(routine, handle, m, n, a, lda, s, u, ldu, v, ldv) || !check_info(routine, info, 1)) {
    return kInvalid;
  }
  const auto arguments = join(types.a, m, n, lda, ldu, ldv);
  if (const auto status = use_workspace(routine, arguments, device, device_bytes, host, host_bytes)) return status;
  *info = svd_one(routine, false, layout, static_cast<int>(m), static_cast<int>(n), static_cast<T*>(a),
                  static_cast<int>(lda), static_cast<T*>(s), static_cast<T*>(u), static_cast<int>(ldu),
                  static_cast<T*>(v), static_cast<int>(ldv));
  return kSuccess;
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
  const char* routine = "cusolverDnXgesvdp";
  if (!expect(jobz == CUSOLVER_EIG_MODE_VECTOR && econ == 1, routine, "mode")) return kInvalid;
  return size64(routine, handle, params, {type_a, type_s, type_u, type_v, compute}, m, n, a, lda, s, u, ldu, v, ldv,
                device, host);
}

cusolverStatus_t CUSOLVERAPI cusolverDnXgesvdp(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                               cusolverEigMode_t jobz, int econ, int64_t m, int64_t n,
                                               cudaDataType type_a, void* a, int64_t lda, cudaDataType type_s, void* s,
                                               cudaDataType type_u, void* u, int64_t ldu, cudaDataType type_v, void* v,
                                               int64_t ldv, cudaDataType compute, void* device, size_t device_bytes,
                                               void* host, size_t host_bytes, int* info, double* perturbation) {
  const char* routine = "cusolverDnXgesvdp";
  if (!expect(jobz == CUSOLVER_EIG_MODE_VECTOR && econ == 1, routine, "mode")) return kInvalid;
  if (!expect(perturbation, routine, "no place for the perturbation")) return kInvalid;
  const auto found = state().perturbation.find(state().matrices[routine]);
  const double value = found == state().perturbation.end() ? 0 : found->second;
  const auto run = type_a == CUDA_R_32F ? run64<float> : run64<double>;
  const auto status = run(routine, Right::kPlain, handle, params, {type_a, type_s, type_u, type_v, compute}, m, n, a,
                          lda, s, u, ldu, v, ldv, device, device_bytes, host, host_bytes, info);
  if (status == kSuccess) state().pending.push_back([=] { *perturbation = value; });
  return status;
}

cusolverStatus_t CUSOLVERAPI cusolverDnXgesvd_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                         signed char jobu, signed char jobvt, int64_t m, int64_t n,
                                                         cudaDataType type_a, const void* a, int64_t lda,
                                                         cudaDataType type_s, const void* s, cudaDataType type_u,
                                                         const void* u, int64_t ldu, cudaDataType type_v, const void* v,
                                                         int64_t ldv, cudaDataType compute, size_t* device,
                                                         size_t* host) {
  const char* routine = "cusolverDnXgesvd";
  if (!expect(jobu == 'S' && jobvt == 'S', routine, "jobs")) return kInvalid;
  return size64(routine, handle, params, {type_a, type_s, type_u, type_v, compute}, m, n, a, lda, s, u, ldu, v, ldv,
                device, host);
}

cusolverStatus_t CUSOLVERAPI cusolverDnXgesvd(cusolverDnHandle_t handle, cusolverDnParams_t params, signed char jobu,
                                              signed char jobvt, int64_t m, int64_t n, cudaDataType type_a, void* a,
                                              int64_t lda, cudaDataType type_s, void* s, cudaDataType type_u, void* u,
                                              int64_t ldu, cudaDataType type_v, void* vt, int64_t ldvt,
                                              cudaDataType compute, void* device, size_t device_bytes, void* host,
                                              size_t host_bytes, int* info) {
  const char* routine = "cusolverDnXgesvd";
  if (!expect(jobu == 'S' && jobvt == 'S', routine, "jobs")) return kInvalid;
  const auto run = type_a == CUDA_R_32F ? run64<float> : run64<double>;
  return run(routine, Right::kTransposed, handle, params, {type_a, type_s, type_u, type_v, compute}, m, n, a, lda, s, u,
             ldu, vt, ldvt, device, device_bytes, host, host_bytes, info);
}

}  // extern "C"
