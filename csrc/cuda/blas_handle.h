// The cuBLAS handle of a thread, and cuBLAS's errors as exceptions; free of torch.
#pragma once

#include <cublas_v2.h>

namespace unirank::cuda {

// The calling thread's handle on `device`, which must be current; made at first use, set to `stream`. It is not torch's
// own, which would keep our settings: no TF32, no sums of 16-bit products shorter than fp32, no atomics.
cublasHandle_t thread_blas_handle(const char* op, int device, cudaStream_t stream);

// Throws std::runtime_error that names op, routine and status.
void check_blas(const char* op, cublasStatus_t status, const char* routine);

}  // namespace unirank::cuda
