#include "cuda/solver_handle.h"

#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

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

// Handles of one thread by device.
class ThreadHandles {
 public:
  ThreadHandles() = default;
  ThreadHandles(const ThreadHandles&) = delete;
  ThreadHandles& operator=(const ThreadHandles&) = delete;

  // The main thread's end is the process's, where the runtime may be unloading already: then it answers every call with
  // an error, and the handles go with the process.
  ~ThreadHandles() {
    int current = 0;
    if (by_device_.empty() || cudaGetDevice(&current) != cudaSuccess) return;
    for (const auto& [device, handle] : by_device_) {
      if (cudaSetDevice(device) == cudaSuccess) cusolverDnDestroy(handle);
    }
    cudaSetDevice(current);
  }

  cusolverDnHandle_t get(const Call& call) {
    const auto found = by_device_.find(call.device);
    if (found != by_device_.end()) return found->second;
    cusolverDnHandle_t handle = nullptr;
    check(call, cusolverDnCreate(&handle), "cusolverDnCreate");
    return by_device_.emplace(call.device, handle).first->second;
  }

 private:
  std::map<int, cusolverDnHandle_t> by_device_;
};

}  // namespace

cusolverDnHandle_t thread_handle(const Call& call) {
  thread_local ThreadHandles handles;
  const cusolverDnHandle_t handle = handles.get(call);
  check(call, cusolverDnSetStream(handle, call.stream), "cusolverDnSetStream");
  return handle;
}

void check(const Call& call, cusolverStatus_t status, const char* routine, Range matrices) {
  if (status == CUSOLVER_STATUS_SUCCESS) return;
  std::ostringstream message;
  message << call.op << ": " << routine << " failed";
  if (matrices.count == 1) message << " on matrix " << matrices.first << " of the batch";
  if (matrices.count > 1) {
    message << " on matrices " << matrices.first << " to " << matrices.first + matrices.count - 1 << " of the batch";
  }
  message << ": " << name(status) << " (" << static_cast<int>(status) << ')';
  throw std::runtime_error(message.str());
}

void check(const Call& call, cudaError_t error, const char* routine) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(call.op) + ": " + routine + " failed: " + cudaGetErrorString(error));
}

}  // namespace unirank::cuda::solver
