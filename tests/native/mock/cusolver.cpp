// The cuSOLVER symbols that the driver links against, declared by NVIDIA's own header so that signatures cannot drift.
#include <cusolverDn.h>

#include <cstring>
#include <limits>
#include <sstream>
#include <thread>

#include "lapack.h"
#include "mock.h"

// NVIDIA's types are opaque, so these definitions are ours to give.
struct cusolverDnContext {
  std::thread::id thread = std::this_thread::get_id();
  bool has_stream = false;
};
struct cusolverDnParams {};
struct gesvdjInfo {};

namespace {

using mock::expect;
using mock::on_device;
using mock::state;

constexpr auto kSuccess = CUSOLVER_STATUS_SUCCESS;
constexpr auto kInvalid = CUSOLVER_STATUS_INVALID_VALUE;

cusolverStatus_t enter(const std::string& routine) { return static_cast<cusolverStatus_t>(mock::enter(routine)); }

template <typename Object>
cusolverStatus_t create(const char* routine, const char* kind, Object** object) {
  if (const auto status = enter(routine)) return status;
  *object = new Object();
  ++state().live[kind];
  ++state().created[kind];
  return kSuccess;
}

template <typename Object>
cusolverStatus_t destroy(const char* routine, const char* kind, Object* object) {
  if (!expect(object, routine, "null")) return kInvalid;
  delete object;
  --state().live[kind];
  return enter(routine);
}

bool is_ready(const std::string& routine, cusolverDnHandle_t handle) {
  return expect(handle, routine, "no handle") && expect(handle->has_stream, routine, "no stream was set") &&
         expect(handle->thread == std::this_thread::get_id(), routine, "handle of another thread");
}

// Answers of the last size queries: the solve that follows must come with the same arguments and no less memory.
struct Query {
  std::string arguments;
  std::size_t device = 0, host = 0;
};
std::map<std::string, Query> queries;

template <typename... Arguments>
std::string join(const Arguments&... arguments) {
  std::ostringstream out;
  ((out << arguments << ' '), ...);
  return out.str();
}

Query answer(const std::string& routine, const std::string& arguments, std::size_t device, std::size_t host) {
  Query& query = queries[routine];
  query = {arguments, device, host};
  Query told = query;
  if (state().short_workspace == routine) told.device /= 2;
  return told;
}

// Every byte of a workspace is written, so that one too short shows under ASan as well.
cusolverStatus_t use_workspace(const std::string& routine, const std::string& arguments, void* device,
                               std::size_t device_bytes, void* host, std::size_t host_bytes) {
  const Query& query = queries[routine];
  if (!expect(query.arguments == arguments, routine,
              "asked for workspace with (" + query.arguments + "), runs with (" + arguments + ")")) {
    return kInvalid;
  }
  if (device_bytes < query.device || host_bytes < query.host) return CUSOLVER_STATUS_INVALID_WORKSPACE;
  if (!expect(on_device(device, device_bytes), routine, "workspace is not device memory") ||
      !expect(host || host_bytes == 0, routine, "no host workspace")) {
    return kInvalid;
  }
  std::memset(device, 0xa5, device_bytes);
  if (host_bytes) std::memset(host, 0xa5, host_bytes);
  return kSuccess;
}

template <typename T>
void fill_nan(T* p, std::size_t n) {
  std::fill(p, p + n, std::numeric_limits<T>::quiet_NaN());
}

template <typename T>
constexpr const char* dtype() {
  return sizeof(T) == 4 ? "float" : "double";
}

// The info to report for the next matrix of a routine, given what LAPACK said. After a failure results are rubbish.
template <typename T>
int outcome(const std::string& routine, int info, T* values, std::size_t n) {
  const int index = state().matrices[routine]++;
  const auto fault = state().info.find({routine, index});
  if (fault == state().info.end()) return info;
  fill_nan(values, n);
  return fault->second;
}

template <typename T>
int eigh_one(const std::string& routine, cublasFillMode_t uplo, int n, T* a, int lda, T* w) {
  bool finite = true;
  for (int j = 0; j < n; ++j) {
    const int begin = uplo == CUBLAS_FILL_MODE_UPPER ? 0 : j, end = uplo == CUBLAS_FILL_MODE_UPPER ? j + 1 : n;
    finite = finite && mock::all_finite(a + j * lda + begin, end - begin);
  }
  if (finite) {
    return outcome(routine, mock::eigh(uplo == CUBLAS_FILL_MODE_UPPER ? 'U' : 'L', n, a, lda, w), w, n);
  }
  fill_nan(a, static_cast<std::size_t>(lda) * n);
  fill_nan(w, n);
  return outcome(routine, state().info_on_nan, w, n);
}

enum class Right { kPlain, kTransposed };

// One SVD with m >= n, left vectors m x (full ? m : n). The input is destroyed, as cuSOLVER's may be.
template <typename T>
int svd_one(const std::string& routine, bool full, Right layout, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v,
            int ldv) {
  int info = state().info_on_nan;
  if (mock::all_finite(a, static_cast<std::size_t>(lda) * n)) {
    info = mock::svd(full ? 'A' : 'S', m, n, a, lda, s, u, ldu, v, ldv);
    if (layout == Right::kPlain) mock::transpose(v, n, ldv);
  } else {
    fill_nan(s, n);
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

bool check_info(const std::string& routine, const int* info, std::int64_t batch) {
  return expect(on_device(info, sizeof(int) * static_cast<std::size_t>(batch)), routine, "info is out of bounds");
}

template <typename T>
cusolverStatus_t gesvdj_size(cusolverDnHandle_t handle, int econ, int m, int n, const T* a, int lda, const T* s,
                             const T* u, int ldu, const T* v, int ldv, int* lwork, gesvdjInfo_t params, int batch,
                             const char* routine) {
  if (const auto status = enter(std::string(routine) + "_bufferSize")) return status;
  if (!check_svd(routine, handle, m, n, a, lda, s, u, ldu, econ ? n : m, v, ldv, batch)) return kInvalid;
  if (!expect(params, routine, "no Jacobi info")) return kInvalid;
  *lwork = static_cast<int>(answer(routine, join(dtype<T>(), econ, m, n, lda, ldu, ldv, batch), 37 + m * n, 0).device);
  return kSuccess;
}

template <typename T>
cusolverStatus_t gesvdj_run(cusolverDnHandle_t handle, int econ, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v,
                            int ldv, T* work, int lwork, int* info, gesvdjInfo_t params, int batch,
                            const char* routine) {
  if (const auto status = enter(routine)) return status;
  if (!check_svd(routine, handle, m, n, a, lda, s, u, ldu, econ ? n : m, v, ldv, batch)) return kInvalid;
  if (!expect(params, routine, "no Jacobi info") || !check_info(routine, info, batch)) return kInvalid;
  // Lengths of this API count elements; the bytes are checked by touching them.
  if (static_cast<std::size_t>(lwork) < queries[routine].device) return CUSOLVER_STATUS_INVALID_WORKSPACE;
  queries[routine].device = static_cast<std::size_t>(lwork) * sizeof(T);
  if (const auto status = use_workspace(routine, join(dtype<T>(), econ, m, n, lda, ldu, ldv, batch), work,
                                        static_cast<std::size_t>(lwork) * sizeof(T), nullptr, 0)) {
    return status;
  }
  queries[routine].device = static_cast<std::size_t>(lwork);
  const std::int64_t u_columns = econ ? n : m;
  for (std::int64_t b = 0; b < batch; ++b) {
    info[b] = svd_one(routine, !econ, Right::kPlain, m, n, a + b * lda * n, lda, s + b * n, u + b * ldu * u_columns,
                      ldu, v + b * ldv * n, ldv);
  }
  return kSuccess;
}

template <typename T>
cusolverStatus_t gesvda_size(cusolverDnHandle_t handle, int rank, int m, int n, const T* a, int lda, long long stride_a,
                             const T* s, long long stride_s, const T* u, int ldu, long long stride_u, const T* v,
                             int ldv, long long stride_v, int* lwork, int batch, const char* routine) {
  if (const auto status = enter(std::string(routine) + "_bufferSize")) return status;
  if (!check_svd(routine, handle, m, n, a, lda, s, u, ldu, n, v, ldv, batch)) return kInvalid;
  if (!expect(rank == n, routine, "rank") || !expect(stride_a >= 1LL * lda * n && stride_s >= rank &&
                                                         stride_u >= 1LL * ldu * rank && stride_v >= 1LL * ldv * rank,
                                                     routine, "stride")) {
    return kInvalid;
  }
  const auto arguments = join(dtype<T>(), rank, m, n, lda, stride_a, stride_s, ldu, stride_u, ldv, stride_v, batch);
  *lwork = static_cast<int>(answer(routine, arguments, 53 + n * n * batch, 0).device);
  return kSuccess;
}

template <typename T>
cusolverStatus_t gesvda_run(cusolverDnHandle_t handle, int rank, int m, int n, const T* a, int lda, long long stride_a,
                            T* s, long long stride_s, T* u, int ldu, long long stride_u, T* v, int ldv,
                            long long stride_v, T* work, int lwork, int* info, double* residual, int batch,
                            const char* routine) {
  if (const auto status = enter(routine)) return status;
  if (!check_svd(routine, handle, m, n, a, lda, s, u, ldu, n, v, ldv, batch)) return kInvalid;
  if (!check_info(routine, info, batch) || !expect(residual, routine, "no residual")) return kInvalid;
  if (static_cast<std::size_t>(lwork) < queries[routine].device) return CUSOLVER_STATUS_INVALID_WORKSPACE;
  const auto arguments = join(dtype<T>(), rank, m, n, lda, stride_a, stride_s, ldu, stride_u, ldv, stride_v, batch);
  if (const auto status =
          use_workspace(routine, arguments, work, static_cast<std::size_t>(lwork) * sizeof(T), nullptr, 0)) {
    return status;
  }
  for (int b = 0; b < batch; ++b) {
    info[b] = svd_one(routine, false, Right::kPlain, m, n, const_cast<T*>(a) + b * stride_a, lda, s + b * stride_s,
                      u + b * stride_u, ldu, v + b * stride_v, ldv);
    state().pending.push_back([=] { residual[b] = 0; });
  }
  return kSuccess;
}

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

template <typename T>
void eigh_batch(const char* routine, cublasFillMode_t uplo, std::int64_t n, void* a, std::int64_t lda, void* w,
                int* info, std::int64_t batch) {
  for (std::int64_t b = 0; b < batch; ++b) {
    info[b] = eigh_one(routine, uplo, static_cast<int>(n), static_cast<T*>(a) + b * lda * n, static_cast<int>(lda),
                       static_cast<T*>(w) + b * n);
  }
}

bool check_eigh(const char* routine, cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                std::int64_t n, cudaDataType type_a, const void* a, std::int64_t lda, cudaDataType type_w,
                const void* w, cudaDataType compute, std::int64_t batch) {
  const std::size_t size = type_a == CUDA_R_32F ? 4 : 8;
  return is_ready(routine, handle) && expect(params, routine, "no params") &&
         expect(jobz == CUSOLVER_EIG_MODE_VECTOR, routine, "mode") &&
         expect(type_a == type_w && type_a == compute && (type_a == CUDA_R_32F || type_a == CUDA_R_64F), routine,
                "dtypes") &&
         expect(n >= 1 && lda >= n && batch >= 1, routine, "shape") &&
         expect(on_device(a, size * lda * n * batch), routine, "a is out of bounds") &&
         expect(on_device(w, size * n * batch), routine, "w is out of bounds");
}

}  // namespace

extern "C" {

cusolverStatus_t CUSOLVERAPI cusolverDnCreate(cusolverDnHandle_t* handle) {
  return create("cusolverDnCreate", "handle", handle);
}

cusolverStatus_t CUSOLVERAPI cusolverDnDestroy(cusolverDnHandle_t handle) {
  return destroy("cusolverDnDestroy", "handle", handle);
}

cusolverStatus_t CUSOLVERAPI cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t) {
  if (const auto status = enter("cusolverDnSetStream")) return status;
  if (!expect(handle, "cusolverDnSetStream", "no handle")) return CUSOLVER_STATUS_NOT_INITIALIZED;
  handle->has_stream = true;
  return kSuccess;
}

cusolverStatus_t CUSOLVERAPI cusolverDnCreateParams(cusolverDnParams_t* params) {
  return create("cusolverDnCreateParams", "params", params);
}

cusolverStatus_t CUSOLVERAPI cusolverDnDestroyParams(cusolverDnParams_t params) {
  return destroy("cusolverDnDestroyParams", "params", params);
}

cusolverStatus_t CUSOLVERAPI cusolverDnCreateGesvdjInfo(gesvdjInfo_t* info) {
  return create("cusolverDnCreateGesvdjInfo", "jacobi info", info);
}

cusolverStatus_t CUSOLVERAPI cusolverDnDestroyGesvdjInfo(gesvdjInfo_t info) {
  return destroy("cusolverDnDestroyGesvdjInfo", "jacobi info", info);
}

cusolverStatus_t CUSOLVERAPI cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                               cusolverEigMode_t jobz, cublasFillMode_t uplo, int64_t n,
                                                               cudaDataType type_a, const void* a, int64_t lda,
                                                               cudaDataType type_w, const void* w, cudaDataType compute,
                                                               size_t* device, size_t* host, int64_t batch) {
  const char* routine = "cusolverDnXsyevBatched";
  if (const auto status = enter("cusolverDnXsyevBatched_bufferSize")) return status;
  if (!check_eigh(routine, handle, params, jobz, n, type_a, a, lda, type_w, w, compute, batch)) return kInvalid;
  const Query told = answer(routine, join(uplo, n, type_a, a, lda, w, batch), 4097 + 64 * n * batch, 129 + n);
  *device = told.device;
  *host = told.host;
  return kSuccess;
}

cusolverStatus_t CUSOLVERAPI cusolverDnXsyevBatched(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                    cusolverEigMode_t jobz, cublasFillMode_t uplo, int64_t n,
                                                    cudaDataType type_a, void* a, int64_t lda, cudaDataType type_w,
                                                    void* w, cudaDataType compute, void* device, size_t device_bytes,
                                                    void* host, size_t host_bytes, int* info, int64_t batch) {
  const char* routine = "cusolverDnXsyevBatched";
  if (const auto status = enter(routine)) return status;
  if (!check_eigh(routine, handle, params, jobz, n, type_a, a, lda, type_w, w, compute, batch)) return kInvalid;
  if (!check_info(routine, info, batch)) return kInvalid;
  const auto arguments = join(uplo, n, type_a, static_cast<const void*>(a), lda, static_cast<const void*>(w), batch);
  if (const auto status = use_workspace(routine, arguments, device, device_bytes, host, host_bytes)) return status;
  (type_a == CUDA_R_32F ? eigh_batch<float> : eigh_batch<double>)(routine, uplo, n, a, lda, w, info, batch);
  return kSuccess;
}

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

// The 32-bit API: one definition for each dtype, under one name in logs and faults.
#define MOCK_SVD_OF(LETTER, T)                                                                                        \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdj_bufferSize(                                                 \
      cusolverDnHandle_t handle, cusolverEigMode_t, int econ, int m, int n, const T* a, int lda, const T* s,          \
      const T* u, int ldu, const T* v, int ldv, int* lwork, gesvdjInfo_t params) {                                    \
    return gesvdj_size(handle, econ, m, n, a, lda, s, u, ldu, v, ldv, lwork, params, 1, "cusolverDn*gesvdj");         \
  }                                                                                                                   \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdj(                                                            \
      cusolverDnHandle_t handle, cusolverEigMode_t, int econ, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, \
      int ldv, T* work, int lwork, int* info, gesvdjInfo_t params) {                                                  \
    return gesvdj_run(handle, econ, m, n, a, lda, s, u, ldu, v, ldv, work, lwork, info, params, 1,                    \
                      "cusolverDn*gesvdj");                                                                           \
  }                                                                                                                   \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdjBatched_bufferSize(                                          \
      cusolverDnHandle_t handle, cusolverEigMode_t, int m, int n, const T* a, int lda, const T* s, const T* u,        \
      int ldu, const T* v, int ldv, int* lwork, gesvdjInfo_t params, int batch) {                                     \
    if (m > 32 || n > 32) return kInvalid;                                                                            \
    return gesvdj_size(handle, 0, m, n, a, lda, s, u, ldu, v, ldv, lwork, params, batch, "cusolverDn*gesvdjBatched"); \
  }                                                                                                                   \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdjBatched(                                                     \
      cusolverDnHandle_t handle, cusolverEigMode_t, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, int ldv,  \
      T* work, int lwork, int* info, gesvdjInfo_t params, int batch) {                                                \
    return gesvdj_run(handle, 0, m, n, a, lda, s, u, ldu, v, ldv, work, lwork, info, params, batch,                   \
                      "cusolverDn*gesvdjBatched");                                                                    \
  }                                                                                                                   \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdaStridedBatched_bufferSize(                                   \
      cusolverDnHandle_t handle, cusolverEigMode_t, int rank, int m, int n, const T* a, int lda, long long stride_a,  \
      const T* s, long long stride_s, const T* u, int ldu, long long stride_u, const T* v, int ldv,                   \
      long long stride_v, int* lwork, int batch) {                                                                    \
    return gesvda_size(handle, rank, m, n, a, lda, stride_a, s, stride_s, u, ldu, stride_u, v, ldv, stride_v, lwork,  \
                       batch, "cusolverDn*gesvdaStridedBatched");                                                     \
  }                                                                                                                   \
  cusolverStatus_t CUSOLVERAPI cusolverDn##LETTER##gesvdaStridedBatched(                                              \
      cusolverDnHandle_t handle, cusolverEigMode_t, int rank, int m, int n, const T* a, int lda, long long stride_a,  \
      T* s, long long stride_s, T* u, int ldu, long long stride_u, T* v, int ldv, long long stride_v, T* work,        \
      int lwork, int* info, double* residual, int batch) {                                                            \
    return gesvda_run(handle, rank, m, n, a, lda, stride_a, s, stride_s, u, ldu, stride_u, v, ldv, stride_v, work,    \
                      lwork, info, residual, batch, "cusolverDn*gesvdaStridedBatched");                               \
  }

MOCK_SVD_OF(S, float)
MOCK_SVD_OF(D, double)

}  // extern "C"
