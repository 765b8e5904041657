// The part of the CUDA runtime that the driver calls. Streams are labels: device work runs at once, copies to the host
// wait for the synchronisation.
#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "mock.h"

namespace {

cudaError_t enter(const char* routine) {
  const int status = mock::enter(routine);
  return static_cast<cudaError_t>(mock::state().lost ? mock::state().lost : status);
}

// It happens even where the synchronisation reports an error.
void run_what_is_pending() {
  const auto pending = std::move(mock::state().pending);
  mock::state().pending.clear();
  for (const auto& write : pending) write();
}

}  // namespace

extern "C" {

cudaError_t CUDARTAPI cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                                      cudaStream_t) {
  if (const auto error = enter("cudaMemcpyAsync")) return error;
  bool good = mock::expect(mock::on_device(source, bytes), "cudaMemcpyAsync", "source is not device memory");
  if (kind == cudaMemcpyDeviceToHost) {
    if (good) mock::state().pending.push_back([=] { std::memcpy(target, source, bytes); });
  } else {
    good = good && mock::expect(kind == cudaMemcpyDeviceToDevice, "cudaMemcpyAsync", "unexpected kind") &&
           mock::expect(mock::on_device(target, bytes), "cudaMemcpyAsync", "target is not device memory");
    if (good) std::memcpy(target, source, bytes);
  }
  return good ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t CUDARTAPI cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch,
                                        size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t) {
  const char* routine = "cudaMemcpy2DAsync";
  if (const auto error = enter(routine)) return error;
  const bool good =
      mock::expect(kind == cudaMemcpyDeviceToDevice, routine, "unexpected kind") &&
      mock::expect(width <= target_pitch && width <= source_pitch, routine, "width beyond a pitch") &&
      mock::expect(mock::on_device(source, source_pitch * (height - 1) + width), routine, "source out of bounds") &&
      mock::expect(mock::on_device(target, target_pitch * (height - 1) + width), routine, "target out of bounds");
  if (!good) return cudaErrorInvalidValue;
  for (size_t i = 0; i < height; ++i) {
    std::memcpy(static_cast<char*>(target) + i * target_pitch, static_cast<const char*>(source) + i * source_pitch,
                width);
  }
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaStreamSynchronize(cudaStream_t) {
  run_what_is_pending();
  return enter("cudaStreamSynchronize");
}

cudaError_t CUDARTAPI cudaDeviceSynchronize() {
  run_what_is_pending();
  return enter("cudaDeviceSynchronize");
}

cudaError_t CUDARTAPI cudaGetLastError() {
  mock::State& s = mock::state();
  return static_cast<cudaError_t>(s.lost ? s.lost : std::exchange(s.last_error, 0));
}

cudaError_t CUDARTAPI cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  if (const auto error = enter("cudaMemsetAsync")) return error;
  if (!mock::expect(mock::on_device(target, bytes), "cudaMemsetAsync", "target is not device memory")) {
    return cudaErrorInvalidValue;
  }
  std::memset(target, value, bytes);
  return cudaSuccess;
}

cudaError_t CUDARTAPI cudaGetDevice(int* device) {
  *device = mock::state().device;
  return enter("cudaGetDevice");
}

cudaError_t CUDARTAPI cudaSetDevice(int device) {
  if (const auto error = enter("cudaSetDevice")) return error;
  mock::state().device = device;
  return cudaSuccess;
}

const char* CUDARTAPI cudaGetErrorString(cudaError_t) { return "mock CUDA error"; }

}  // extern "C"
