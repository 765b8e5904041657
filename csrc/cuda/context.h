// The state of the CUDA context after a failure, and the words for memory that ran out.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace unirank::cuda {

// Stands in every error for memory of the GPU that is not to be had, as in torch's own; unirank.errors.is_out_of_memory
// looks for these words.
inline constexpr const char* kOutOfMemory = "CUDA out of memory";

// Most errors of CUDA belong to one call. Those of a kernel that broke (an illegal address, a hardware fault) are
// sticky: the context is lost, and from then on every call of the process fails with the same error, whoever makes it.
// Waits for the device, takes away an error that belonged to one call, so that nobody finds it after a launch of his
// own, and returns a sentence where the context is lost, else an empty one.
inline std::string words_of_a_lost_context() {
  cudaDeviceSynchronize();
  cudaGetLastError();
  const cudaError_t error = cudaDeviceSynchronize();
  if (error == cudaSuccess) return {};
  return std::string(" The CUDA context is lost (") + cudaGetErrorString(error) +
         "): every later CUDA call of this process fails too, so start it again.";
}

}  // namespace unirank::cuda
