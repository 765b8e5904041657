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

#include "cuda/context.h"
#include "cuda/matrices.h"
#include "cuda/solver_handle.h"

namespace unirank::cuda::solver {

// The 32-bit API has a function for each dtype, the 64-bit API takes the dtype as an argument.
template <typename T>
struct Api;

template <>
struct Api<float> {
  static constexpr cudaDataType type = CUDA_R_32F;
  static constexpr const char* name = "float32";
  static constexpr auto gesvdj_batched_size = cusolverDnSgesvdjBatched_bufferSize;
  static constexpr auto gesvdj_batched = cusolverDnSgesvdjBatched;
};

template <>
struct Api<double> {
  static constexpr cudaDataType type = CUDA_R_64F;
  static constexpr const char* name = "float64";
  static constexpr auto gesvdj_batched_size = cusolverDnDgesvdjBatched_bufferSize;
  static constexpr auto gesvdj_batched = cusolverDnDgesvdjBatched;
};

template <typename T>
T* allocate(const Call& call, std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  void* p = call.scratch.device(bytes);
  if (!p) {
    throw std::runtime_error(std::string(call.op) + ": " + kOutOfMemory + ". Tried to allocate " +
                             std::to_string(bytes) + " bytes of memory for cuSOLVER's workspace.");
  }
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

// [count] zeros.
inline int* allocate_info(const Call& call, std::int64_t count) {
  int* info = allocate<int>(call, count);
  check(call, cudaMemsetAsync(info, 0, static_cast<std::size_t>(count) * sizeof(int), call.stream), "cudaMemsetAsync");
  return info;
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

// The first of `count` matrices that is not finite, or `count`; waits for the stream.
template <typename T>
std::int64_t first_not_finite(const Call& call, const T* a, std::int64_t count, std::int64_t m, std::int64_t n,
                              bool upper) {
  unsigned long long* device = allocate<unsigned long long>(call, 1);
  unsigned long long found = 0;
  queue_scan(call, a, count, m, n, upper, device);
  copy_to_host(call, &found, device, 1);
  synchronize(call);
  return count - static_cast<std::int64_t>(found);
}

// Throws std::invalid_argument for the first matrix that is not finite. Before a solver gets it: what cuSOLVER does
// with NaN is not documented, and differs between routines and versions: EXECUTION_FAILED, or an info. One pass over
// the matrices, some thousandth of the time of the decomposition.
template <typename T>
void require_finite(const Call& call, const T* a, Range matrices, std::int64_t m, std::int64_t n, bool upper) {
  const std::int64_t b = first_not_finite(call, a + matrices.first * m * n, matrices.count, m, n, upper);
  if (b == matrices.count) return;
  throw std::invalid_argument(std::string(call.op) + ": matrix " + std::to_string(matrices.first + b) +
                              " of the batch is not finite");
}

// The status of a solver. EXECUTION_FAILED is its answer to input that it cannot take, and also to a kernel of its own
// that broke; so the matrices are looked at once more, for a caller may have written to them meanwhile, and info, which
// must have been zeroed, may tell which of the batch it was.
template <typename T>
void check_solver(const Call& call, cusolverStatus_t status, const char* routine, Range matrices, const int* info,
                  const T* a, std::int64_t m, std::int64_t n, bool upper) {
  if (status != CUSOLVER_STATUS_EXECUTION_FAILED) return check(call, status, routine, matrices);
  const std::string lost = words_of_a_lost_context();
  if (!lost.empty()) throw std::runtime_error(failure(call, status, routine, matrices) + '.' + lost);
  require_finite(call, a, matrices, m, n, upper);
  std::vector<int> told(static_cast<std::size_t>(matrices.count));
  copy_to_host(call, told.data(), info + matrices.first, matrices.count);
  synchronize(call);
  const auto named = std::find_if(told.begin(), told.end(), [](int i) { return i != 0; });
  if (named != told.end()) matrices = {matrices.first + (named - told.begin()), 1};
  throw std::runtime_error(failure(call, status, routine, matrices) + ", info " +
                           std::to_string(named == told.end() ? 0 : *named) + "; all values are finite");
}

// Throws on the first matrix that failed. It was finite when it was scanned, and is looked at once more, as above.
template <typename T>
void check_outcome(const Call& call, const Outcome<T>& outcome, const T* a, std::int64_t m, std::int64_t n,
                   bool upper) {
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(outcome.info.size()); ++b) {
    const int info = outcome.info[static_cast<std::size_t>(b)];
    if (info == 0 && outcome.is_finite(b)) continue;
    require_finite(call, a, {b, 1}, m, n, upper);
    std::ostringstream message;
    message << call.op << ": ";
    if (info != 0) {
      message << "cuSOLVER did not converge on matrix " << b << " of the batch (info " << info << ')';
    } else {
      message << "matrix " << b << " of the batch is finite, but its decomposition overflows " << Api<T>::name;
    }
    throw std::invalid_argument(message.str());
  }
}

// Runs the body. Where it throws, waits for the device before anything is freed that queued work may still write to,
// and leaves no error behind: one of a single call is taken away, a sticky one is told. What the body makes itself is
// gone by then, so host memory that copies go to belongs outside.
template <typename Body>
void settle_on_failure(const Call& call, const Body& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    const std::string lost = words_of_a_lost_context();
    if (lost.empty() || std::string(error.what()).find(lost) != std::string::npos) throw;
    throw std::runtime_error(std::string(error.what()) + '.' + lost);
  } catch (...) {
    cudaStreamSynchronize(call.stream);
    throw;
  }
}

}  // namespace unirank::cuda::solver
