// Batched eigendecomposition and SVD on cuSOLVER, free of torch: raw device pointers, a stream, and scratch memory from
// the caller. Only cuSOLVER's and the runtime's C functions are called, so the tests can link a mock in their place.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace unirank::cuda::solver {

// Memory that stays valid until the call it was passed to returns. The device's may be handed out again by then only to
// work behind it on the same stream, which is what torch's caching allocator does.
class Scratch {
 public:
  virtual void* device(std::size_t bytes) = 0;
  virtual void* host(std::size_t bytes) = 0;

 protected:
  ~Scratch() = default;
};

struct Call {
  const char* op;  // opens every error message
  int device;
  cudaStream_t stream;
  Scratch& scratch;
};

// cuSOLVER's batched Jacobi refuses longer sides.
inline constexpr std::int64_t kJacobiBatchedSide = 32;

// All matrices are column-major and packed; T is float or double; B and every side at least 1.
// Both functions return after the work is done: they synchronise the stream once to learn that all matrices are finite,
// before cuSOLVER gets them, once to read the outcome of the batch, and svd once more where QR iteration had to repair
// what another method left.
// They throw std::invalid_argument where a matrix is not finite, did not converge or overflows (naming the first), and
// std::runtime_error where cuSOLVER, the runtime or the allocator fails, which says so where the context is lost.

// a[b] = v[b] diag(w[b]) v[b]ᵀ with w ascending; reads the upper triangle of a [B, n, n]; w [B, n], v [B, n, n].
template <typename T>
void eigh(const Call& call, std::int64_t B, std::int64_t n, const T* a, T* w, T* v);

// a[b] = left[b] diag(s[b]) right[b]ᵀ with s descending, for m >= n; a and left [B, m, n], s [B, n], right [B, n, n].
// Both sides up to kJacobiBatchedSide: gesvdjBatched, one call for the batch. Larger: Xgesvdp (polar), matrix by
// matrix. Where it perturbs a matrix, or either does not converge, Xgesvd (QR iteration) solves that one again.
template <typename T>
void svd(const Call& call, std::int64_t B, std::int64_t m, std::int64_t n, const T* a, T* s, T* left, T* right);

}  // namespace unirank::cuda::solver
