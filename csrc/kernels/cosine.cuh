// Token cosines of two streams, and the running sums that UniRank's functional importance is made of.
//
// Memory path: x and y are read once, with 16-byte loads where pointers and row strides allow; the cosine of each row
// (8 bytes) goes to scratch and is read once more. Products and sums are fp64: products of shorter floats are then
// exact and cannot overflow, as the op promises. At two rows a fp64 rate of half the fp32 rate keeps up with memory;
// on cards with a sixty-fourth the kernel is bound by arithmetic, which beside the forward pass that made the rows
// (D times the work) does not show.
#pragma once

#include "kernels/reduce.cuh"

namespace unirank::kernels {

struct Moments {
  double xy, xx, yy;
};

struct CosineSums {
  double cosine, square;
};

struct Add {
  __device__ Moments operator()(const Moments& a, const Moments& b) const {
    return {a.xy + b.xy, a.xx + b.xx, a.yy + b.yy};
  }
  __device__ CosineSums operator()(const CosineSums& a, const CosineSums& b) const {
    return {a.cosine + b.cosine, a.square + b.square};
  }
};

__device__ __forceinline__ Moments shuffle_xor(const Moments& m, int distance) {
  return {shuffle_xor(m.xy, distance), shuffle_xor(m.xx, distance), shuffle_xor(m.yy, distance)};
}
__device__ __forceinline__ CosineSums shuffle_xor(const CosineSums& s, int distance) {
  return {shuffle_xor(s.cosine, distance), shuffle_xor(s.square, distance)};
}

template <typename In>
__device__ __forceinline__ void add_product(Moments& m, In x, In y) {
  const double a = widen(x), b = widen(y);
  m.xy += a * b;
  m.xx += a * a;
  m.yy += b * b;
}

// One thread's share of a row: packs first, first + step, ... and then the elements that fill no pack.
template <typename In, bool kVector>
__device__ __forceinline__ Moments row_moments(const In* x, const In* y, i64 D, int first, int step) {
  Moments m{};
  i64 scalar_from = 0;
  if constexpr (kVector) {
    const i64 packs = D / kPack<In>;
    for (i64 p = first; p < packs; p += step) {
      In a[kPack<In>], b[kPack<In>];
      load_pack(x + p * kPack<In>, a);
      load_pack(y + p * kPack<In>, b);
#pragma unroll
      for (int i = 0; i < kPack<In>; ++i) add_product(m, a[i], b[i]);
    }
    scalar_from = packs * kPack<In>;
  }
  for (i64 d = scalar_from + first; d < D; d += step) add_product(m, x[d], y[d]);
  return m;
}

__device__ __forceinline__ double cosine_of(const Moments& m) {
  if (!isfinite(m.xx) || !isfinite(m.yy)) return kNaN;
  if (m.xx == 0 || m.yy == 0) return 0;
  // Two roots, because xx * yy overflows long before its root does.
  const double cosine = m.xy / (sqrt(m.xx) * sqrt(m.yy));
  return cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
}

template <typename In>
struct Streams {
  const In *x, *y;         // [T, D]
  i64 x_stride, y_stride;  // elements from a row to the next
  i64 T, D;

  bool allow_vector_loads() const {
    const auto aligned = [](const In* p, i64 stride) {
      return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && stride % kPack<In> == 0;
    };
    return aligned(x, x_stride) && aligned(y, y_stride);
  }
};

constexpr int kRowThreads = 256;

// cosine[t] of each row t. kWidth threads share a row: a warp (eight rows a block) or the whole block.
// registers: cosine_rows <= 64
template <typename In, int kWidth, bool kVector>
__global__ void __launch_bounds__(kRowThreads, 4) cosine_rows(Streams<In> s, double* __restrict__ cosine) {
  static_assert(kWidth == kWarp || kWidth == kRowThreads);
  const i64 t = static_cast<i64>(blockIdx.x) * (kRowThreads / kWidth) + threadIdx.x / kWidth;
  // All threads of a row leave together, so no reduction waits for them.
  if (t >= s.T) return;
  const int first = static_cast<int>(threadIdx.x) % kWidth;
  Moments m = row_moments<In, kVector>(s.x + t * s.x_stride, s.y + t * s.y_stride, s.D, first, kWidth);
  if constexpr (kWidth == kWarp) {
    m = warp_reduce(m, Add{});
  } else {
    UNIRANK_SHARED(Moments, scratch, kRowThreads / kWarp);
    m = block_reduce<kRowThreads / kWarp>(m, scratch, Add{});
  }
  if (first == 0) cosine[t] = cosine_of(m);
}

constexpr int kTotalThreads = 512;

// state += (sum of cosines, sum of their squares, T). One block: the order of the sum does not depend on the device.
// registers: add_cosines <= 64
static __global__ void __launch_bounds__(kTotalThreads, 2)
    add_cosines(const double* __restrict__ cosine, i64 T, double* __restrict__ state) {
  UNIRANK_SHARED(CosineSums, scratch, kTotalThreads / kWarp);
  CosineSums sums{};
  for (i64 t = threadIdx.x; t < T; t += kTotalThreads) {
    const double c = cosine[t];
    sums = Add{}(sums, {c, c * c});
  }
  sums = block_reduce<kTotalThreads / kWarp>(sums, scratch, Add{});
  if (threadIdx.x == 0) {
    state[0] += sums.cosine;
    state[1] += sums.square;
    state[2] += static_cast<double>(T);
  }
}

// Up to here a warp has at most four 16-byte loads a lane and stream in flight in 16-bit dtypes; a longer row is shared
// by a block.
constexpr i64 kLongestWarpRow = 1024;

// Host side, the whole op: `scratch` holds T doubles, `launch(kernel, grid, block, arguments...)` queues a kernel.
template <typename In, typename Launch>
void accumulate_cosines(const Launch& launch, const Streams<In>& s, double* scratch, double* state) {
  const auto rows = [&](auto kernel, int width) {
    launch(kernel, dim3(blocks_for(s.T, kRowThreads / width)), dim3(kRowThreads), s, scratch);
  };
  const bool vector = s.allow_vector_loads();
  if (s.D <= kLongestWarpRow) {
    rows(vector ? cosine_rows<In, kWarp, true> : cosine_rows<In, kWarp, false>, kWarp);
  } else {
    rows(vector ? cosine_rows<In, kRowThreads, true> : cosine_rows<In, kRowThreads, false>, kRowThreads);
  }
  launch(add_cosines, dim3(1), dim3(kTotalThreads), scratch, s.T, state);
}

}  // namespace unirank::kernels
