// What stands around cuSOLVER: the search for a matrix that is not finite, and square matrices turned over.
//
// Memory path: the search reads once what the solver will read, a warp a column, neighbouring lanes neighbouring rows;
// it writes nothing where all is well. Turning reads and writes once, along columns on both sides.
#pragma once

#include "kernels/platform.cuh"

namespace unirank::kernels {

constexpr int kScanThreads = 256;

// found = max(found, B - b) for each matrix b that holds a value which is not finite: 0 where there is none, and a
// maximum does not depend on who comes first. Column-major [m, n] matrices; of upper ones only rows up to the diagonal
// are read. Grid: columns of the batch / 8.
// registers: find_not_finite <= 32
template <typename T>
__global__ void __launch_bounds__(kScanThreads)
    find_not_finite(const T* __restrict__ a, i64 B, i64 m, i64 n, bool upper, unsigned long long* found) {
  const i64 column = static_cast<i64>(blockIdx.x) * (kScanThreads / kWarp) + threadIdx.x / kWarp;
  if (column >= B * n) return;
  const i64 b = column / n, j = column - b * n, rows = upper ? j + 1 : m;
  bool finite = true;
  for (i64 i = threadIdx.x % kWarp; i < rows; i += kWarp) finite = finite && isfinite(a[column * m + i]);
  if (!finite) atomicMax(found, static_cast<unsigned long long>(B - b));
}

constexpr int kTurnSide = 32, kTurnRows = 8;

// target[i, j] = source[j, i] of [n, n] matrices. A tile is turned in shared memory, whose rows are one element longer
// than a warp, so that a column lies in 32 different banks. Grid: tiles, tiles; block: 32 by 8.
// registers: turn_square <= 64
template <typename T>
__global__ void __launch_bounds__(kTurnSide* kTurnRows, 4)
    turn_square(const T* __restrict__ source, i64 n, T* __restrict__ target) {
  UNIRANK_SHARED(T, tile, kTurnSide * (kTurnSide + 1));
  const i64 i0 = static_cast<i64>(blockIdx.y) * kTurnSide, j0 = static_cast<i64>(blockIdx.x) * kTurnSide;
  const int lane = static_cast<int>(threadIdx.x);
  for (int row = static_cast<int>(threadIdx.y); row < kTurnSide; row += kTurnRows) {
    if (i0 + row < n && j0 + lane < n) tile[row * (kTurnSide + 1) + lane] = source[(i0 + row) * n + j0 + lane];
  }
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.y); row < kTurnSide; row += kTurnRows) {
    if (j0 + row < n && i0 + lane < n) target[(j0 + row) * n + i0 + lane] = tile[lane * (kTurnSide + 1) + row];
  }
}

// Host side; `launch(kernel, grid, block, arguments...)` queues a kernel. `found` must be 0.
template <typename T, typename Launch>
void scan_matrices(const Launch& launch, const T* a, i64 B, i64 m, i64 n, bool upper, unsigned long long* found) {
  launch(find_not_finite<T>, dim3(blocks_for(B * n, kScanThreads / kWarp)), dim3(kScanThreads), a, B, m, n, upper,
         found);
}

template <typename T, typename Launch>
void transpose_square(const Launch& launch, const T* source, i64 n, T* target) {
  const unsigned tiles = blocks_for(n, kTurnSide);
  launch(turn_square<T>, dim3(tiles, tiles), dim3(kTurnSide, kTurnRows), source, n, target);
}

}  // namespace unirank::kernels
