#include "cuda/blas_handle.h"

#include <stdexcept>
#include <string>

#include "cuda/context.h"
#include "cuda/thread_handles.h"

namespace unirank::cuda {
namespace {

cublasHandle_t create(const char* op) {
  cublasHandle_t handle = nullptr;
  check_blas(op, cublasCreate(&handle), "cublasCreate");
  // Partial sums of 16-bit products stay in fp32: the op promises fp32 within a chunk.
  const auto mode = static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
  try {
    check_blas(op, cublasSetMathMode(handle, mode), "cublasSetMathMode");
    check_blas(op, cublasSetAtomicsMode(handle, CUBLAS_ATOMICS_NOT_ALLOWED), "cublasSetAtomicsMode");
  } catch (...) {
    cublasDestroy(handle);
    throw;
  }
  return handle;
}

}  // namespace

cublasHandle_t thread_blas_handle(const char* op, int device, cudaStream_t stream) {
  thread_local ThreadHandles<cublasHandle_t, cublasDestroy> handles;
  const cublasHandle_t handle = handles.get(device, [&] { return create(op); });
  check_blas(op, cublasSetStream(handle, stream), "cublasSetStream");
  return handle;
}

void check_blas(const char* op, cublasStatus_t status, const char* routine) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::string message = std::string(op) + ": " + routine + " failed: " + cublasGetStatusString(status);
  if (status == CUBLAS_STATUS_ALLOC_FAILED) message += std::string(", ") + kOutOfMemory;
  throw std::runtime_error(message);
}

}  // namespace unirank::cuda
