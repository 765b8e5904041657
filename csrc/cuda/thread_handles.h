// Ownership of the handles of cuBLAS and cuSOLVER: one for each device that a thread works on.
#pragma once

#include <cuda_runtime_api.h>

#include <map>

namespace unirank::cuda {

// A handle belongs to the device that was current when it was made, and is not for sharing between threads. Keep one
// object of this class thread_local in a function that is no template: every instance of a template would have its own.
template <typename Handle, auto kDestroy>
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
      if (cudaSetDevice(device) == cudaSuccess) kDestroy(handle);
    }
    cudaSetDevice(current);
  }

  // create() makes one on the current device, which must be `device`, or throws.
  template <typename Create>
  Handle get(int device, const Create& create) {
    const auto found = by_device_.find(device);
    return found != by_device_.end() ? found->second : by_device_.emplace(device, create()).first->second;
  }

 private:
  std::map<int, Handle> by_device_;
};

}  // namespace unirank::cuda
