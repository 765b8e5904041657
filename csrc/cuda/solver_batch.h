// What one batch needs around the cuSOLVER calls: typed names, workspaces, chunks, and the reading of its outcome.
#pragma once

#include <cusolverDn.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/solver_handle.h"

namespace unirank::cuda::solver {

// The 32-bit API has a function for each dtype, the 64-bit API takes the dtype as an argument.
template <typename T>
struct Api;

template <>
struct Api<float> {
  static constexpr cudaDataType type = CUDA_R_32F;
  static constexpr auto gesvdj_size = cusolverDnSgesvdj_bufferSize;
  static constexpr auto gesvdj = cusolverDnSgesvdj;
  static constexpr auto gesvdj_batched_size = cusolverDnSgesvdjBatched_bufferSize;
  static constexpr auto gesvdj_batched = cusolverDnSgesvdjBatched;
};

template <>
struct Api<double> {
  static constexpr cudaDataType type = CUDA_R_64F;
  static constexpr auto gesvdj_size = cusolverDnDgesvdj_bufferSize;
  static constexpr auto gesvdj = cusolverDnDgesvdj;
  static constexpr auto gesvdj_batched_size = cusolverDnDgesvdjBatched_bufferSize;
  static constexpr auto gesvdj_batched = cusolverDnDgesvdjBatched;
};

template <typename T>
T* allocate(const Call& call, std::int64_t count) {
  void* p = call.scratch.device(static_cast<std::size_t>(count) * sizeof(T));
  if (!p) throw std::runtime_error(std::string(call.op) + ": no device memory for cuSOLVER's workspace");
  return static_cast<T*>(p);
}

// The two workspaces of a 64-bit routine, kept for the next matrix while they suffice.
class Workspace {
 public:
  explicit Workspace(const Call& call) : call_(call) {}

  void reserve(std::size_t device_bytes, std::size_t host_bytes) {
    if (device_bytes > device_bytes_) {
      device_ = allocate<std::byte>(call_, static_cast<std::int64_t>(device_bytes));
      device_bytes_ = device_bytes;
    }
    if (host_bytes > host_bytes_) {
      host_ = call_.scratch.host(host_bytes);
      if (!host_) throw std::runtime_error(std::string(call_.op) + ": no host memory for cuSOLVER's workspace");
      host_bytes_ = host_bytes;
    }
  }

  void* device() const { return device_; }
  std::size_t device_bytes() const { return device_bytes_; }
  void* host() const { return host_; }
  std::size_t host_bytes() const { return host_bytes_; }

 private:
  const Call& call_;
  void* device_ = nullptr;
  void* host_ = nullptr;
  std::size_t device_bytes_ = 0, host_bytes_ = 0;
};

// The workspace of a 32-bit routine: its length counts elements, in an int that a large batch can overflow.
template <typename T>
T* legacy_workspace(const Call& call, int length, const char* routine) {
  if (length < 0) {
    throw std::runtime_error(std::string(call.op) + ": " + routine + " asks for a workspace beyond 32 bits");
  }
  return allocate<T>(call, std::max(length, 1));
}

// How many matrices one batched call gets. cuSOLVER computes offsets into the batch in 32 bits (JAX bounds the bytes
// for this), and XsyevBatched was seen to refuse batches of 40000 small matrices with INVALID_VALUE.
inline std::int64_t chunk_length(std::int64_t matrix_bytes) {
  constexpr std::int64_t kMostMatrices = 16384;
  return std::clamp<std::int64_t>(std::numeric_limits<int>::max() / matrix_bytes, 1, kMostMatrices);
}

// Calls run(first, count) over the batch in chunks.
template <typename Run>
void in_chunks(std::int64_t B, std::int64_t length, const Run& run) {
  for (std::int64_t first = 0; first < B; first += length) run(first, std::min(length, B - first));
}

template <typename T>
void copy_on_device(const Call& call, T* target, const T* source, std::int64_t count) {
  check(call,
        cudaMemcpyAsync(target, source, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDeviceToDevice,
                        call.stream),
        "cudaMemcpyAsync");
}

template <typename T>
void copy_to_host(const Call& call, T* target, const T* source, std::int64_t count) {
  check(
      call,
      cudaMemcpyAsync(target, source, static_cast<std::size_t>(count) * sizeof(T), cudaMemcpyDeviceToHost, call.stream),
      "cudaMemcpyAsync");
}

inline void synchronize(const Call& call) { check(call, cudaStreamSynchronize(call.stream), "cudaStreamSynchronize"); }

// What became of a batch: cuSOLVER's info and the eigenvalues or singular values of each matrix.
template <typename T>
struct Outcome {
  std::vector<int> info;
  std::vector<T> values;  // [B, K]
  std::int64_t K;

  Outcome(std::int64_t B, std::int64_t K)
      : info(static_cast<std::size_t>(B)), values(static_cast<std::size_t>(B * K)), K(K) {}

  // The one synchronisation: values and info together.
  void read(const Call& call, const int* device_info, const T* device_values) {
    copy_to_host(call, info.data(), device_info, static_cast<std::int64_t>(info.size()));
    copy_to_host(call, values.data(), device_values, static_cast<std::int64_t>(values.size()));
    synchronize(call);
  }

  const T* row(std::int64_t b) const { return values.data() + b * K; }

  bool is_finite(std::int64_t b) const {
    return std::all_of(row(b), row(b) + K, [](T v) { return std::isfinite(v); });
  }
};

// Throws on the first matrix that failed. The input itself is looked at only then: a value that is not finite reaches
// the results, or keeps the iteration from converging, so a batch that succeeds pays no pass for the check.
// is_read(i, j) says which elements of an [m, n] matrix the routine reads.
template <typename T, typename IsRead>
void check_outcome(const Call& call, const Outcome<T>& outcome, const T* a, std::int64_t m, std::int64_t n,
                   const IsRead& is_read) {
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(outcome.info.size()); ++b) {
    const int info = outcome.info[static_cast<std::size_t>(b)];
    if (info == 0 && outcome.is_finite(b)) continue;
    // After a failure the values may be whatever the memory held, so the input decides what to say.
    bool finite = info != 0;
    if (finite) {
      std::vector<T> input(static_cast<std::size_t>(m * n));
      copy_to_host(call, input.data(), a + b * m * n, m * n);
      synchronize(call);
      for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = 0; i < m; ++i) finite = finite && (!is_read(i, j) || std::isfinite(input[j * m + i]));
      }
    }
    std::ostringstream message;
    message << call.op << ": ";
    if (finite) {
      message << "cuSOLVER did not converge on matrix " << b << " of the batch (info " << info << ')';
    } else {
      message << "matrix " << b << " of the batch is not finite";
    }
    throw std::invalid_argument(message.str());
  }
}

// Runs the body; where it throws, waits for the stream first: what is queued may still write to host memory that the
// unwinding would free.
template <typename Body>
void wait_on_failure(const Call& call, const Body& body) {
  try {
    body();
  } catch (...) {
    cudaStreamSynchronize(call.stream);
    throw;
  }
}

}  // namespace unirank::cuda::solver
