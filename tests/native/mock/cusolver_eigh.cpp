// The symmetric eigensolver.
#include "cusolver.h"
#include "lapack.h"

using namespace mock::cusolver;

namespace {

// The status too is what becomes of input that is not finite.
template <typename T>
int eigh_one(const std::string& routine, cublasFillMode_t uplo, int n, T* a, int lda, T* w, cusolverStatus_t& status) {
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
  status = static_cast<cusolverStatus_t>(state().status_on_nan);
  return outcome(routine, state().info_on_nan, w, n);
}

template <typename T>
cusolverStatus_t eigh_batch(const char* routine, cublasFillMode_t uplo, std::int64_t n, void* a, std::int64_t lda,
                            void* w, int* info, std::int64_t batch) {
  auto status = kSuccess;
  for (std::int64_t b = 0; b < batch; ++b) {
    info[b] = eigh_one(routine, uplo, static_cast<int>(n), static_cast<T*>(a) + b * lda * n, static_cast<int>(lda),
                       static_cast<T*>(w) + b * n, status);
  }
  return status;
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
  return (type_a == CUDA_R_32F ? eigh_batch<float> : eigh_batch<double>)(routine, uplo, n, a, lda, w, info, batch);
}

}  // extern "C"
