// What a kernel may use of CUDA: the same names under nvcc and under the host emulator of the tests.
#pragma once

#ifdef UNIRANK_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// Under the emulator: memory that reports indices out of bounds, races and reads of what nobody wrote.
#define UNIRANK_SHARED(T, name, n) __shared__ T name[n]
#endif

#include <cstdint>
#include <cstring>
#include <limits>

namespace unirank::kernels {

using i64 = std::int64_t;
using Bf16 = __nv_bfloat16;
using Fp16 = __half;

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Every dtype here widens exactly.
__device__ __forceinline__ float widen(Bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(Fp16 v) { return __half2float(v); }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }

// 16 bytes are the widest load of one thread.
template <typename In>
constexpr int kPack = 16 / static_cast<int>(sizeof(In));

template <typename In>
__device__ __forceinline__ void load_pack(const In* source, In (&target)[kPack<In>]) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(source));
  memcpy(static_cast<void*>(target), &raw, sizeof raw);
}

inline unsigned blocks_for(i64 work, i64 per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

}  // namespace unirank::kernels
