// Reductions in one fixed order, so that a result's bits depend on nothing but the input.
#pragma once

#include "kernels/platform.cuh"

namespace unirank::kernels {

__device__ __forceinline__ double shuffle_xor(double v, int distance) {
  return __shfl_xor_sync(kWholeWarp, v, distance);
}
__device__ __forceinline__ i64 shuffle_xor(i64 v, int distance) {
  return __shfl_xor_sync(kWholeWarp, static_cast<long long>(v), distance);
}

// `op` over the lanes of a whole warp; every lane gets the result, with the same bits because `op` is symmetric.
template <typename V, typename Op>
__device__ __forceinline__ V warp_reduce(V v, Op op) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v = op(v, shuffle_xor(v, distance));
  return v;
}

// `op` over a block of kWarps whole warps; every thread gets the result. `scratch`: shared memory, kWarps of V;
// before the same scratch is used again, the caller must pass a barrier.
template <int kWarps, typename V, typename Shared, typename Op>
__device__ V block_reduce(V v, Shared& scratch, Op op) {
  v = warp_reduce(v, op);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  V result = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) result = op(result, scratch[warp]);
  return result;
}

}  // namespace unirank::kernels
