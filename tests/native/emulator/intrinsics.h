// CUDA's device functions and keywords, as far as the kernels use them, on top of the block scheduler.
#pragma once

#include <bit>
#include <cmath>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (::emulator::Machine::instance().current->index)
#define blockIdx (::emulator::Machine::instance().block_index)
#define blockDim (::emulator::Machine::instance().block)
#define gridDim (::emulator::Machine::instance().grid)

using std::isfinite;
using std::sqrt;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

template <typename T>
std::uint64_t to_slot(T v) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  std::uint64_t slot = 0;
  std::memcpy(&slot, &v, sizeof v);
  return slot;
}

template <typename T>
T shuffle(unsigned mask, T v, unsigned source, const Place& place) {
  const std::uint64_t slot =
      Machine::instance().warp_call({WarpCall::Shuffle, mask, source % kWarp, to_slot(v), 0}, place);
  std::memcpy(&v, &slot, sizeof v);
  return v;
}

inline unsigned lane() { return Machine::instance().current->lane(); }

template <typename T, typename Change>
T atomic(T* target, const Place& place, Change change) {
  Machine::instance().pause(place);
  const T old = *target;
  *target = change(old);
  return old;
}

}  // namespace emulator

inline void __syncthreads(const emulator::Place& place = emulator::Place::current()) {
  emulator::Machine::instance().barrier(false, place);
}
inline int __syncthreads_count(int predicate, const emulator::Place& place = emulator::Place::current()) {
  return static_cast<int>(emulator::Machine::instance().barrier(predicate != 0, place));
}
inline int __syncthreads_or(int predicate, const emulator::Place& place = emulator::Place::current()) {
  return emulator::Machine::instance().barrier(predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, const emulator::Place& place = emulator::Place::current()) {
  return emulator::Machine::instance().barrier(predicate == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, const emulator::Place& place = emulator::Place::current()) {
  emulator::Machine::instance().warp_call({emulator::WarpCall::Sync, mask, emulator::lane(), 0, 0}, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T v, int source, const emulator::Place& place = emulator::Place::current()) {
  return emulator::shuffle(mask, v, static_cast<unsigned>(source), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int distance, const emulator::Place& place = emulator::Place::current()) {
  return emulator::shuffle(mask, v, emulator::lane() ^ static_cast<unsigned>(distance), place);
}
// Beyond the warp's end a lane keeps its own value.
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned distance, const emulator::Place& place = emulator::Place::current()) {
  const unsigned lane = emulator::lane(), source = lane + distance;
  return emulator::shuffle(mask, v, source < emulator::kWarp ? source : lane, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const emulator::Place& place = emulator::Place::current()) {
  return static_cast<unsigned>(emulator::Machine::instance().warp_call(
      {emulator::WarpCall::Vote, mask, emulator::lane(), predicate != 0, 0}, place));
}
inline int __any_sync(unsigned mask, int predicate, const emulator::Place& place = emulator::Place::current()) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const emulator::Place& place = emulator::Place::current()) {
  return __ballot_sync(mask, predicate, place) == mask;
}

template <typename T>
T atomicAdd(T* target, T v, const emulator::Place& place = emulator::Place::current()) {
  return emulator::atomic(target, place, [=](T old) { return old + v; });
}
template <typename T>
T atomicMin(T* target, T v, const emulator::Place& place = emulator::Place::current()) {
  return emulator::atomic(target, place, [=](T old) { return v < old ? v : old; });
}
template <typename T>
T atomicMax(T* target, T v, const emulator::Place& place = emulator::Place::current()) {
  return emulator::atomic(target, place, [=](T old) { return old < v ? v : old; });
}
template <typename T>
T atomicCAS(T* target, T expected, T v, const emulator::Place& place = emulator::Place::current()) {
  return emulator::atomic(target, place, [=](T old) { return old == expected ? v : old; });
}

// A wide load from an address that is not a multiple of its width is an error on the device and none on x86.
template <typename T>
T __ldg(const T* source, const emulator::Place& place = emulator::Place::current()) {
  const emulator::Machine& m = emulator::Machine::instance();
  if (reinterpret_cast<std::uintptr_t>(source) % sizeof(T) != 0) m.fault("misaligned load", *m.current, place);
  T v;
  std::memcpy(&v, static_cast<const void*>(source), sizeof v);
  return v;
}
