// What surrounds the matrix product of the second moment: column sums, widening sums, the mirror.
//
// Memory path: the column sums read the rows once, a warp reading 32 neighbouring columns; every other kernel streams
// its operand once. The product itself is cuBLAS and bounds the op from T of a few hundred on.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/platform.cuh"

namespace unirank::kernels {

// Rows whose products are summed in the compute dtype before they join the gram, which is read and written once for
// each chunk: four of the CPU kernel's. docs/numerics.md bounds what the longer fp32 sum costs.
constexpr i64 kChunk = 8192;
// Rows of the gram that one product computes: enough for all multiprocessors, and only these squares on the diagonal
// are computed whole.
constexpr i64 kPanel = 2048;

constexpr int kColumns = 32, kRowLanes = 8;
constexpr i64 kSlice = 128;  // rows of one partial column sum
constexpr i64 kMaxSlices = kChunk / kSlice;

// partial[s, n] = sum of x[t, n] over the rows t of slice s. Grid: columns / 32, slices.
// registers: column_sums <= 64
template <typename In>
__global__ void __launch_bounds__(kColumns* kRowLanes, 4)
    column_sums(const In* __restrict__ x, i64 stride, i64 T, i64 N, double* __restrict__ partial) {
  UNIRANK_SHARED(double, scratch, kColumns* kRowLanes);
  const i64 n = static_cast<i64>(blockIdx.x) * kColumns + threadIdx.x;
  const i64 slice = blockIdx.y, begin = slice * kSlice, end = begin + kSlice < T ? begin + kSlice : T;
  double sum = 0;
  if (n < N) {
    for (i64 t = begin + threadIdx.y; t < end; t += kRowLanes) sum += widen(x[t * stride + n]);
  }
  scratch[threadIdx.y * kColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || n >= N) return;
  for (int lane = 1; lane < kRowLanes; ++lane) sum += scratch[lane * kColumns + threadIdx.x];
  partial[slice * N + n] = sum;
}

constexpr int kThreads = 256;

// mean[n] += sum of the partial sums, in order.
// registers: add_partials <= 64
template <typename Acc>
__global__ void __launch_bounds__(kThreads, 4)
    add_partials(const double* __restrict__ partial, i64 slices, i64 N, Acc* __restrict__ mean) {
  const i64 n = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= N) return;
  double sum = 0;
  for (i64 slice = 0; slice < slices; ++slice) sum += partial[slice * N + n];
  mean[n] += static_cast<Acc>(sum);
}

// gram[i, j] += product[i - first, j] for j <= i: rows first.. of the lower half. Grid: columns / 256, rows.
// registers: add_lower <= 64
template <typename C, typename Acc>
__global__ void __launch_bounds__(kThreads, 4)
    add_lower(const C* __restrict__ product, i64 width, i64 first, i64 N, Acc* __restrict__ gram) {
  const i64 j = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x, row = blockIdx.y, i = first + row;
  if (j > i) return;
  gram[i * N + j] += static_cast<Acc>(product[row * width + j]);
}

constexpr int kTile = 32;

// gram[j, i] = gram[i, j] for j < i. A tile is turned in shared memory, so that both sides are read and written along
// rows; its rows are one element longer than a warp, so that a column lies in 32 different banks.
// Grid: tiles, tiles; block: 32 by 8.
// registers: mirror_lower <= 64
template <typename Acc>
__global__ void __launch_bounds__(kColumns* kRowLanes, 4) mirror_lower(Acc* gram, i64 N) {
  if (blockIdx.x > blockIdx.y) return;
  UNIRANK_SHARED(Acc, tile, kTile * (kTile + 1));
  const i64 j0 = static_cast<i64>(blockIdx.x) * kTile, i0 = static_cast<i64>(blockIdx.y) * kTile;
  const int column = static_cast<int>(threadIdx.x);
  for (int row = static_cast<int>(threadIdx.y); row < kTile; row += kRowLanes) {
    if (i0 + row < N && j0 + column < N) tile[row * (kTile + 1) + column] = gram[(i0 + row) * N + j0 + column];
  }
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.y); row < kTile; row += kRowLanes) {
    const i64 j = j0 + row, i = i0 + column;
    if (j < i && i < N) gram[j * N + i] = tile[column * (kTile + 1) + row];
  }
}

// What a product is summed in: fp64 for fp64, fp32 for everything shorter.
template <typename In>
using Compute = std::conditional_t<std::is_same_v<In, double>, double, float>;

template <typename In>
struct Rows {
  const In* x;  // [T, N]
  i64 stride;   // elements from a row to the next
  i64 T, N;
};

// Scratch of one call.
template <typename In, typename Acc>
struct GramScratch {
  double* partial;       // [kMaxSlices, N]
  Compute<In>* product;  // [kPanel, N]; null where gram's dtype is the compute dtype

  static constexpr bool widens = !std::is_same_v<Compute<In>, Acc>;
};

// Host side, the whole op. `launch(kernel, grid, block, arguments...)` queues a kernel; `multiply(x, stride, rows,
// first, last, beta, out, ld)` queues out[i - first, j] = beta out[i - first, j] + sum_t x[t, i] x[t, j] for first <= i
// < last and j < last, in the compute dtype.
template <typename In, typename Acc, typename Launch, typename Multiply>
void accumulate_gram(const Launch& launch, const Multiply& multiply, const Rows<In>& source,
                     const GramScratch<In, Acc>& scratch, Acc* gram, Acc* mean) {
  // Torch gives the only row of a [1, N] view any stride, and cuBLAS takes none below N.
  const i64 N = source.N, stride = source.T == 1 ? N : source.stride;
  const dim3 tile_block(kColumns, kRowLanes);
  for (i64 begin = 0; begin < source.T; begin += kChunk) {
    const i64 T = std::min(kChunk, source.T - begin), slices = (T + kSlice - 1) / kSlice;
    const In* x = source.x + begin * stride;
    launch(column_sums<In>, dim3(blocks_for(N, kColumns), unsigned(slices)), tile_block, x, stride, T, N,
           scratch.partial);
    launch(add_partials<Acc>, dim3(blocks_for(N, kThreads)), dim3(kThreads), scratch.partial, slices, N, mean);
    for (i64 first = 0; first < N; first += kPanel) {
      const i64 last = std::min(first + kPanel, N);
      if constexpr (GramScratch<In, Acc>::widens) {
        multiply(x, stride, T, first, last, 0, scratch.product, last);
        launch(add_lower<Compute<In>, Acc>, dim3(blocks_for(last, kThreads), unsigned(last - first)), dim3(kThreads),
               scratch.product, last, first, N, gram);
      } else {
        multiply(x, stride, T, first, last, 1, gram + first * N, N);
      }
    }
  }
  launch(mirror_lower<Acc>, dim3(blocks_for(N, kTile), blocks_for(N, kTile)), tile_block, gram, N);
}

}  // namespace unirank::kernels
