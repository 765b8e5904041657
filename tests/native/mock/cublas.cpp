// Handles of cuBLAS, which belong to a device and a thread; no mathematics.
#include <cublas_v2.h>

#include <thread>

#include "mock.h"

// NVIDIA's type is opaque, so this definition is ours to give.
struct cublasContext {
  std::thread::id thread = std::this_thread::get_id();
  int device = mock::state().device;
};

namespace {

cublasStatus_t enter(const char* routine) { return static_cast<cublasStatus_t>(mock::enter(routine)); }

cublasStatus_t use(const char* routine, cublasHandle_t handle) {
  if (const auto status = enter(routine)) return status;
  const bool good = mock::expect(handle, routine, "no handle") &&
                    mock::expect(handle->thread == std::this_thread::get_id(), routine, "handle of another thread") &&
                    mock::expect(handle->device == mock::state().device, routine, "on another device");
  return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

}  // namespace

extern "C" {

cublasStatus_t CUBLASWINAPI cublasCreate_v2(cublasHandle_t* handle) {
  if (const auto status = enter("cublasCreate")) return status;
  *handle = new cublasContext();
  ++mock::state().live["blas handle"];
  ++mock::state().created["blas handle"];
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t CUBLASWINAPI cublasDestroy_v2(cublasHandle_t handle) {
  if (const auto status = use("cublasDestroy", handle)) return status;
  delete handle;
  --mock::state().live["blas handle"];
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t CUBLASWINAPI cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  const auto wanted = CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  mock::expect(static_cast<int>(mode) == static_cast<int>(wanted), "cublasSetMathMode", "mode");
  return use("cublasSetMathMode", handle);
}

cublasStatus_t CUBLASWINAPI cublasSetAtomicsMode(cublasHandle_t handle, cublasAtomicsMode_t mode) {
  mock::expect(mode == CUBLAS_ATOMICS_NOT_ALLOWED, "cublasSetAtomicsMode", "mode");
  return use("cublasSetAtomicsMode", handle);
}

cublasStatus_t CUBLASWINAPI cublasSetStream_v2(cublasHandle_t handle, cudaStream_t) {
  return use("cublasSetStream", handle);
}

const char* CUBLASWINAPI cublasGetStatusString(cublasStatus_t) { return "mock cuBLAS status"; }

}  // extern "C"
