#include "cuda/solver_handle.h"

#include <sstream>
#include <stdexcept>

#include "cuda/context.h"
#include "cuda/thread_handles.h"

namespace unirank::cuda::solver {
namespace {

const char* name(cusolverStatus_t status) {
  switch (status) {
    case CUSOLVER_STATUS_NOT_INITIALIZED:
      return "CUSOLVER_STATUS_NOT_INITIALIZED";
    case CUSOLVER_STATUS_ALLOC_FAILED:
      return "CUSOLVER_STATUS_ALLOC_FAILED";
    case CUSOLVER_STATUS_INVALID_VALUE:
      return "CUSOLVER_STATUS_INVALID_VALUE";
    case CUSOLVER_STATUS_ARCH_MISMATCH:
      return "CUSOLVER_STATUS_ARCH_MISMATCH";
    case CUSOLVER_STATUS_MAPPING_ERROR:
      return "CUSOLVER_STATUS_MAPPING_ERROR";
    case CUSOLVER_STATUS_EXECUTION_FAILED:
      return "CUSOLVER_STATUS_EXECUTION_FAILED";
    case CUSOLVER_STATUS_INTERNAL_ERROR:
      return "CUSOLVER_STATUS_INTERNAL_ERROR";
    case CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED:
      return "CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED";
    case CUSOLVER_STATUS_NOT_SUPPORTED:
      return "CUSOLVER_STATUS_NOT_SUPPORTED";
    case CUSOLVER_STATUS_INVALID_WORKSPACE:
      return "CUSOLVER_STATUS_INVALID_WORKSPACE";
    default:
      return "status";
  }
}

}  // namespace

cusolverDnHandle_t thread_handle(const Call& call) {
  thread_local ThreadHandles<cusolverDnHandle_t, cusolverDnDestroy> handles;
  const cusolverDnHandle_t handle = handles.get(call.device, [&] {
    cusolverDnHandle_t created = nullptr;
    check(call, cusolverDnCreate(&created), "cusolverDnCreate");
    return created;
  });
  check(call, cusolverDnSetStream(handle, call.stream), "cusolverDnSetStream");
  return handle;
}

std::string failure(const Call& call, cusolverStatus_t status, const char* routine, Range matrices) {
  std::ostringstream message;
  message << call.op << ": " << routine << " failed";
  if (matrices.count == 1) message << " on matrix " << matrices.first << " of the batch";
  if (matrices.count > 1) {
    message << " on matrices " << matrices.first << " to " << matrices.first + matrices.count - 1 << " of the batch";
  }
  message << ": " << name(status) << " (" << static_cast<int>(status) << ')';
  if (status == CUSOLVER_STATUS_ALLOC_FAILED) message << ", " << kOutOfMemory;
  return message.str();
}

void check(const Call& call, cusolverStatus_t status, const char* routine, Range matrices) {
  if (status != CUSOLVER_STATUS_SUCCESS) throw std::runtime_error(failure(call, status, routine, matrices));
}

void check(const Call& call, cudaError_t error, const char* routine) {
  if (error == cudaSuccess) return;
  const char* words = error == cudaErrorMemoryAllocation ? kOutOfMemory : cudaGetErrorString(error);
  throw std::runtime_error(std::string(call.op) + ": " + routine + " failed: " + words);
}

}  // namespace unirank::cuda::solver
