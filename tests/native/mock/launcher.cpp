// The CUDA launcher, csrc/cuda/linalg.cu, compiled for this machine and registered as unirank_mock for CPU tensors: its
// layouts and checks run unchanged on memory of the CPU, on top of the mock cuSOLVER.
#include <torch/csrc/stable/library.h>

#define UNIRANK_REGISTER_FOR_CPU(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(unirank_mock, CPU, m)

STABLE_TORCH_LIBRARY(unirank_mock, m) {
  m.def("batched_eigh(Tensor a) -> (Tensor w, Tensor v)");
  m.def("batched_svd(Tensor a) -> (Tensor u, Tensor s, Tensor vh)");
}

#define UNIRANK_LINALG_REGISTRATION UNIRANK_REGISTER_FOR_CPU
#include "cuda/linalg.cu"

// The CPU build of torch has no CUDA streams, and refuses to guard a device it has not got.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}
