// Scratch memory on cache-line boundaries. BLAS picks code by the alignment of what it is given, so operands that
// start anywhere would get bits that depend on where the allocator, or the place in a batch, put them.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace unirank {

inline constexpr std::size_t kAlignment = 64;

template <typename T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kAlignment})); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t{kAlignment}); }
  friend bool operator==(const AlignedAllocator&, const AlignedAllocator&) { return true; }
};

template <typename T>
using Workspace = std::vector<T, AlignedAllocator<T>>;

}  // namespace unirank
