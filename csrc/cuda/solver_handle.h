// Ownership of cuSOLVER's objects, and its errors as exceptions.
#pragma once

#include <cusolverDn.h>

#include <cstdint>
#include <string>

#include "cuda/solver.h"

namespace unirank::cuda::solver {

// The calling thread's handle on call.device, made at first use, set to call.stream. cuSOLVER handles are not for
// sharing between threads. A thread's handles are destroyed when it ends.
cusolverDnHandle_t thread_handle(const Call& call);

// Matrices [first, first + count) of the batch, for messages; count 0 where the failure concerns none.
struct Range {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

// "OP: ROUTINE failed on matrix 3 of the batch: CUSOLVER_STATUS_... (n)"
std::string failure(const Call& call, cusolverStatus_t status, const char* routine, Range matrices);

// Throws std::runtime_error that names op, routine, matrices and status.
void check(const Call& call, cusolverStatus_t status, const char* routine, Range matrices = {});
void check(const Call& call, cudaError_t error, const char* routine);

class Params {
 public:
  explicit Params(const Call& call) { check(call, cusolverDnCreateParams(&params_), "cusolverDnCreateParams"); }
  ~Params() { cusolverDnDestroyParams(params_); }
  Params(const Params&) = delete;
  Params& operator=(const Params&) = delete;
  operator cusolverDnParams_t() const { return params_; }

 private:
  cusolverDnParams_t params_ = nullptr;
};

// Jacobi's settings. The defaults stand: tolerance at machine precision, 100 sweeps, sorted values.
class JacobiInfo {
 public:
  explicit JacobiInfo(const Call& call) {
    check(call, cusolverDnCreateGesvdjInfo(&info_), "cusolverDnCreateGesvdjInfo");
  }
  ~JacobiInfo() { cusolverDnDestroyGesvdjInfo(info_); }
  JacobiInfo(const JacobiInfo&) = delete;
  JacobiInfo& operator=(const JacobiInfo&) = delete;
  operator gesvdjInfo_t() const { return info_; }

 private:
  gesvdjInfo_t info_ = nullptr;
};

}  // namespace unirank::cuda::solver
