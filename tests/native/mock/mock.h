// A machine without a GPU that looks like one to the cuSOLVER driver: cuSOLVER and a little of the runtime on host
// memory, with LAPACK for the mathematics. It checks what it is asked, counts what it hands out, and fails on request.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace mock {

struct State {
  // What happened.
  std::vector<std::string> log;         // routines in call order
  std::vector<std::string> violations;  // misuse that real cuSOLVER might accept in silence
  std::map<std::string, int> live;      // handles, params, jacobi infos, allocations that exist now
  std::map<std::string, int> created;
  std::map<const char*, std::size_t> memory;  // device allocations by address
  std::map<std::string, int> matrices;        // solved so far, by routine

  // What shall go wrong.
  struct Fault {
    int status;
    int after;  // calls that succeed first
    int loses;  // not 0: the CUDA error that every later call of the runtime answers, the context being lost
  };
  std::map<std::string, Fault> faults;
  std::map<std::pair<std::string, int>, int> info;  // (routine, matrix it solves) -> info
  std::map<int, double> perturbation;               // matrix -> what Xgesvdp reports
  std::string short_workspace;                      // routine whose query answers half of what it needs
  int info_on_nan = 0, status_on_nan = 6;           // what solvers answer to input that is not finite: EXECUTION_FAILED
  int scans_that_miss = 0;            // scans that call every matrix finite, as if one was written to after them
  int allocations_that_succeed = -1;  // -1: all

  // The runtime's own state.
  int device = 0;      // the current one
  int last_error = 0;  // of a single call; the next cudaGetLastError takes it away
  int lost = 0;        // sticky: stays

  // Memory outside `memory` is accepted where torch's allocator, not the tests', owns it.
  bool strict_memory = true;
  // Copies to the host and host results, done only when the stream is synchronised: whoever reads early reads rubbish.
  std::vector<std::function<void()>> pending;
};

State& state();

// Notes the call; the injected status, or 0.
int enter(const std::string& routine);

// Notes a violation where `good` is false; returns `good`.
bool expect(bool good, const std::string& routine, const std::string& what);

// Whether [p, p + bytes) is device memory.
bool on_device(const void* p, std::size_t bytes);

void* allocate(const char* kind, std::size_t bytes);
void release(const char* kind, void* p);

}  // namespace mock
