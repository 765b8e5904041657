// Between torch and the kernels: the current stream, scratch memory, and rows as pointer and stride.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <utility>
#include <vector>

#include "cuda/memory.h"
#include "operands.h"

namespace unirank::cuda {

using i64 = std::int64_t;

// Torch's current stream on the device of a tensor; calling it queues a kernel. Empty grids launch nothing.
class Queue {
 public:
  explicit Queue(const Tensor& on) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) const {
    if (grid.x == 0 || grid.y == 0) return;
    kernel<<<grid, block, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Scratch from torch's caching allocator. It may be released while kernels still run: the allocator hands it out again
// only behind them, on the same stream.
class Scratch {
 public:
  Scratch(const char* op, Tensor like) : op_(op), like_(std::move(like)) {}

  template <typename T>
  T* take(i64 count) {
    held_.push_back(empty_bytes(op_, like_, count * static_cast<i64>(sizeof(T))));
    return data<T>(held_.back());
  }

 private:
  const char* op_;
  Tensor like_;
  std::vector<Tensor> held_;
};

// The same matrix with neighbouring elements in a row, copied only if they are not, or if rows are so far apart that a
// 32-bit leading dimension does not reach. The stride of a single row says nothing: torch calls any contiguous.
inline Tensor with_rows(const char* op, const Tensor& x) {
  const bool usable = x.stride(1) == 1 && x.stride(0) >= x.size(1) && x.stride(0) < (i64{1} << 31);
  return usable ? x : contiguous(op, x);
}

inline void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  check(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", argument,
        " must be on cuda:", like.get_device_index(), ", as the others are");
}

}  // namespace unirank::cuda
