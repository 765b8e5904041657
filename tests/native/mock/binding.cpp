// Python's side of the mock: run the driver on numpy arrays, set faults, read the counts.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <exception>
#include <optional>
#include <thread>
#include <vector>

#include "cuda/blas_handle.h"
#include "cuda/memory.h"
#include "cuda/solver.h"
#include "mock.h"

namespace py = pybind11;
namespace solver = unirank::cuda::solver;
using solver::Call;

namespace {

constexpr const char* kDevice = "device memory";
constexpr const char* kHost = "host memory";

class MockScratch final : public solver::Scratch {
 public:
  ~MockScratch() {
    for (const auto& [kind, p] : taken_) mock::release(kind, p);
  }
  void* device(std::size_t bytes) override { return take(kDevice, bytes); }
  void* host(std::size_t bytes) override { return take(kHost, bytes); }

 private:
  void* take(const char* kind, std::size_t bytes) {
    void* p = mock::allocate(kind, bytes);
    if (p) taken_.emplace_back(kind, p);
    return p;
  }
  std::vector<std::pair<const char*, void*>> taken_;
};

// An array's copy in device memory, outside the budget of injected allocation failures.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(std::size_t count) : count_(count) {
    const int budget = std::exchange(mock::state().allocations_that_succeed, -1);
    p_ = static_cast<T*>(mock::allocate(kDevice, count * sizeof(T)));
    mock::state().allocations_that_succeed = budget;
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { mock::release(kDevice, p_); }

  T* get() const { return p_; }
  void read(const T* source) { std::memcpy(p_, source, count_ * sizeof(T)); }
  py::array_t<T> array(std::vector<py::ssize_t> shape) const { return py::array_t<T>(shape, p_); }

 private:
  std::size_t count_;
  T* p_;
};

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Arrays are the memory as cuSOLVER sees it: axes (batch, column, row).
template <typename T>
py::tuple eigh(const Array<T>& a, int device) {
  const auto B = a.shape(0), n = a.shape(1);
  OnDevice<T> input(a.size()), w(B * n), v(a.size());
  input.read(a.data());
  MockScratch scratch;
  mock::state().device = device;  // as the launcher's guard
  solver::eigh<T>(Call{"batched_eigh", device, nullptr, scratch}, B, n, input.get(), w.get(), v.get());
  return py::make_tuple(w.array({B, n}), v.array({B, n, n}));
}

template <typename T>
py::tuple svd(const Array<T>& a) {
  const auto B = a.shape(0), n = a.shape(1), m = a.shape(2);
  OnDevice<T> input(a.size()), s(B * n), left(a.size()), right(B * n * n);
  input.read(a.data());
  MockScratch scratch;
  mock::state().device = 0;
  solver::svd<T>(Call{"batched_svd", 0, nullptr, scratch}, B, m, n, input.get(), s.get(), left.get(), right.get());
  return py::make_tuple(left.array({B, n, m}), s.array({B, n}), right.array({B, n, n}));
}

// Clears what happened and what shall; the thread's handles live on and stay counted.
void reset() {
  mock::State& s = mock::state();
  mock::State fresh;
  fresh.live = s.live;
  fresh.memory = s.memory;
  fresh.device = s.device;
  fresh.strict_memory = s.strict_memory;
  s = std::move(fresh);
}

// Runs a callable on a thread of its own and waits: the thread's handles must go with it. What it raises is raised
// here.
void on_a_thread(const py::function& body) {
  std::exception_ptr raised;
  {
    py::gil_scoped_release release;
    std::thread([&] {
      py::gil_scoped_acquire acquire;
      try {
        body();
      } catch (...) {
        raised = std::current_exception();
      }
    }).join();
  }
  if (raised) std::rethrow_exception(raised);
}

}  // namespace

PYBIND11_MODULE(solver_mock, m) {
  m.def("eigh", eigh<float>, py::arg("a").noconvert(), py::arg("device") = 0);
  m.def("eigh", eigh<double>, py::arg("a").noconvert(), py::arg("device") = 0);
  m.def("svd", svd<float>, py::arg("a").noconvert());
  m.def("svd", svd<double>, py::arg("a").noconvert());
  m.def("reset", reset);
  m.def("on_a_thread", on_a_thread);
  // For the test in which a handle is leaked on purpose.
  m.def("forget_handle", [] { --mock::state().live["handle"]; });
  m.def("blas_handle", [](int device) {
    mock::state().device = device;
    return reinterpret_cast<std::uintptr_t>(unirank::cuda::thread_blas_handle("an op", device, nullptr));
  });
  m.def("allocation_failure", [](std::int64_t bytes, const std::optional<std::string>& words) {
    return unirank::cuda::allocation_failure("an op", bytes, words ? words->c_str() : nullptr);
  });
  m.def("last_error", [] { return mock::state().last_error; });
  m.def("lose_context", [](int error) { mock::state().lost = error; });
  m.def("set_scans_that_miss", [](int count) { mock::state().scans_that_miss = count; });
  m.def("log", [] { return mock::state().log; });
  m.def("violations", [] { return mock::state().violations; });
  m.def("live", [] { return mock::state().live; });
  m.def("created", [] { return mock::state().created; });
  m.def(
      "fail",
      [](const std::string& routine, int status, int after, int loses) {
        mock::state().faults[routine] = {status, after, loses};
      },
      py::arg("routine"), py::arg("status"), py::arg("after") = 0, py::arg("loses") = 0);
  m.def("set_info",
        [](const std::string& routine, int matrix, int info) { mock::state().info[{routine, matrix}] = info; });
  m.def("set_perturbation", [](int matrix, double value) { mock::state().perturbation[matrix] = value; });
  m.def("set_short_workspace", [](const std::string& routine) { mock::state().short_workspace = routine; });
  m.def("set_answer_to_nan", [](int status, int info) {
    mock::state().status_on_nan = status;
    mock::state().info_on_nan = info;
  });
  m.def("set_allocations_that_succeed", [](int count) { mock::state().allocations_that_succeed = count; });
  m.def("set_strict_memory", [](bool strict) { mock::state().strict_memory = strict; });
}
