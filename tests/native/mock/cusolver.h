// What the files of the mock cuSOLVER share: the types behind its handles, the checks of handles and workspaces,
// injected outcomes. Every routine is declared by NVIDIA's own header, so that signatures cannot drift.
#pragma once

#include <cusolverDn.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <string>
#include <thread>

#include "mock.h"

// NVIDIA's types are opaque, so these definitions are ours to give.
struct cusolverDnContext {
  std::thread::id thread = std::this_thread::get_id();
  int device = mock::state().device;
  bool has_stream = false;
};
struct cusolverDnParams {};
struct gesvdjInfo {};

namespace mock::cusolver {

using mock::expect;
using mock::on_device;
using mock::state;

constexpr auto kSuccess = CUSOLVER_STATUS_SUCCESS;
constexpr auto kInvalid = CUSOLVER_STATUS_INVALID_VALUE;

inline cusolverStatus_t enter(const std::string& routine) {
  const int status = mock::enter(routine);
  return state().lost ? CUSOLVER_STATUS_EXECUTION_FAILED : static_cast<cusolverStatus_t>(status);
}

bool is_ready(const std::string& routine, cusolverDnHandle_t handle);

bool check_info(const std::string& routine, const int* info, std::int64_t batch);

// Answers of the last size queries: the solve that follows must come with the same arguments and no less memory.
struct Query {
  std::string arguments;
  std::size_t device = 0, host = 0;
};
Query& last_query(const std::string& routine);

template <typename... Arguments>
std::string join(const Arguments&... arguments) {
  std::ostringstream out;
  ((out << arguments << ' '), ...);
  return out.str();
}

// Notes the query; what to tell the caller, which is less where a short workspace is asked for.
Query answer(const std::string& routine, const std::string& arguments, std::size_t device, std::size_t host);

// Every byte of a workspace is written, so that one too short shows under ASan as well.
cusolverStatus_t use_workspace(const std::string& routine, const std::string& arguments, void* device,
                               std::size_t device_bytes, void* host, std::size_t host_bytes);

template <typename T>
void fill_nan(T* p, std::size_t n) {
  std::fill(p, p + n, std::numeric_limits<T>::quiet_NaN());
}

template <typename T>
constexpr const char* dtype() {
  return sizeof(T) == 4 ? "float" : "double";
}

// The info to report for the next matrix of a routine, given what LAPACK said. After a failure results are rubbish.
template <typename T>
int outcome(const std::string& routine, int info, T* values, std::size_t n) {
  const int index = state().matrices[routine]++;
  const auto fault = state().info.find({routine, index});
  if (fault == state().info.end()) return info;
  fill_nan(values, n);
  return fault->second;
}

}  // namespace mock::cusolver
