// Small kernels that say what the emulator does: right ones with a known result, wrong ones with a known fault.
#include <map>
#include <stdexcept>

#include "dispatch.h"
#include "drivers.h"
#include "emulator.h"

namespace drivers {
namespace {

constexpr int kThreads = 96;  // three warps

void barrier_orders(i64* out) {
  UNIRANK_SHARED(int, cell, kThreads);
  cell[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = cell[kThreads - 1 - threadIdx.x];
}

void warp_barrier_orders(i64* out) {
  UNIRANK_SHARED(int, cell, kThreads);
  cell[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = cell[threadIdx.x ^ 1];
}

void shuffles_move_values(i64* out) {
  const i64 lane = threadIdx.x % 32;
  const i64 from_seven = __shfl_sync(~0u, lane, 7), next = __shfl_down_sync(~0u, lane, 1);
  out[threadIdx.x] = 10000 * from_seven + 100 * next + __shfl_xor_sync(~0u, lane, 5);
}

void half_warps_may_shuffle_alone(i64* out) {
  const int lane = threadIdx.x % 32;
  out[threadIdx.x] = lane < 16 ? __shfl_xor_sync(0x0000ffffu, lane, 1) : -1;
}

void votes_count(i64* out) {
  const int odd = threadIdx.x % 2;
  const int count = __syncthreads_count(odd);
  const int logic = 4 * __syncthreads_or(odd) + 2 * __syncthreads_and(odd) + (__ballot_sync(~0u, odd) == 0xaaaaaaaau);
  out[threadIdx.x] = 100 * count + 10 * logic + 2 * __any_sync(~0u, odd) + __all_sync(~0u, odd);
}

void atomics_lose_nothing(i64* out) {
  static i64 total, largest, smallest, owner;
  if (threadIdx.x == 0) total = largest = 0, smallest = 1000, owner = -1;
  __syncthreads();
  const i64 me = threadIdx.x;
  atomicAdd(&total, i64{1});
  atomicMax(&largest, me);
  atomicMin(&smallest, me);
  atomicCAS(&owner, i64{-1}, me);
  __syncthreads();
  out[threadIdx.x] = 1000 * total + largest + smallest;
}

void reports_who_came_first(i64* out) {  // a race in global memory: the schedule decides
  static i64 first;
  if (threadIdx.x == 0) first = -1;
  __syncthreads();
  atomicCAS(&first, i64{-1}, i64{threadIdx.x});
  __syncthreads();
  out[threadIdx.x] = first;
}

void missing_barrier(i64* out) {
  UNIRANK_SHARED(int, cell, kThreads);
  cell[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = cell[(threadIdx.x + 32) % kThreads];
}

void overwritten_too_early(i64* out) {
  UNIRANK_SHARED(int, cell, kThreads);
  cell[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = cell[(threadIdx.x + 32) % kThreads];
  cell[threadIdx.x] = 2;
}

void two_writers(i64*) {
  UNIRANK_SHARED(int, cell, 1);
  cell[0] = static_cast<int>(threadIdx.x);
}

void warp_barrier_between_warps(i64* out) {
  UNIRANK_SHARED(int, cell, kThreads);
  cell[threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = cell[(threadIdx.x + 32) % kThreads];
}

void reads_the_last_blocks_memory(i64* out) {
  UNIRANK_SHARED(int, cell, kThreads);
  if (blockIdx.x == 0) cell[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = cell[threadIdx.x];
}

void shared_out_of_bounds(i64*) {
  UNIRANK_SHARED(int, cell, kThreads);
  cell[threadIdx.x + 1] = 1;
}

void divergent_barrier(i64*) {
  if (threadIdx.x < 32) return;
  __syncthreads();
}

void different_barriers(i64*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void shuffle_with_absent_lanes(i64* out) {
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1);
}

void shuffle_from_outside_the_mask(i64* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, static_cast<int>(threadIdx.x), 16);
}

void shuffle_without_the_caller(i64* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, static_cast<int>(threadIdx.x), 1);
}

void shuffle_against_a_barrier(i64* out) {
  if (threadIdx.x % 32 == 0) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1);
}

void misaligned_load(i64* out) {
  const auto* bytes = reinterpret_cast<const char*>(out) + 8 * (reinterpret_cast<std::uintptr_t>(out) % 16 == 0);
  out[0] = __ldg(reinterpret_cast<const uint4*>(bytes)).x;
}

void writes_outside_an_operand(i64* out) { out[threadIdx.x + 1] = 0; }

}  // namespace

std::vector<i64> probe(const std::string& name, unsigned seed) {
#define UNIRANK_PROBE(kernel) \
  {                           \
    #kernel, kernel           \
  }
  static const std::map<std::string, void (*)(i64*)> kernels = {
      UNIRANK_PROBE(barrier_orders),
      UNIRANK_PROBE(warp_barrier_orders),
      UNIRANK_PROBE(shuffles_move_values),
      UNIRANK_PROBE(half_warps_may_shuffle_alone),
      UNIRANK_PROBE(votes_count),
      UNIRANK_PROBE(atomics_lose_nothing),
      UNIRANK_PROBE(reports_who_came_first),
      UNIRANK_PROBE(missing_barrier),
      UNIRANK_PROBE(overwritten_too_early),
      UNIRANK_PROBE(two_writers),
      UNIRANK_PROBE(warp_barrier_between_warps),
      UNIRANK_PROBE(reads_the_last_blocks_memory),
      UNIRANK_PROBE(shared_out_of_bounds),
      UNIRANK_PROBE(divergent_barrier),
      UNIRANK_PROBE(different_barriers),
      UNIRANK_PROBE(shuffle_with_absent_lanes),
      UNIRANK_PROBE(shuffle_from_outside_the_mask),
      UNIRANK_PROBE(shuffle_without_the_caller),
      UNIRANK_PROBE(shuffle_against_a_barrier),
      UNIRANK_PROBE(misaligned_load),
      UNIRANK_PROBE(writes_outside_an_operand),
  };
#undef UNIRANK_PROBE
  const auto kernel = kernels.find(name);
  if (kernel == kernels.end()) throw std::invalid_argument("no probe is called " + name);
  emulator::Guarded<i64> out(kThreads);
  emulator::Launch{seed}(kernel->second, dim3(2), dim3(kThreads), out.data());
  out.check();
  return std::vector<i64>(out.data(), out.data() + kThreads);
}

std::vector<float> widened(Dtype dtype, const std::vector<std::uint16_t>& bits) {
  std::vector<float> wide;
  for (const std::uint16_t b : bits) {
    wide.push_back(dtype == Dtype::Bf16 ? __bfloat162float({b}) : __half2float({b}));
  }
  return wide;
}

}  // namespace drivers
