// The kernels that the driver launches itself, run by the emulator on the mock's memory.
#include "cuda/matrices.h"

#include "../emulator/drivers.h"
#include "cuda/solver_handle.h"
#include "mock.h"

namespace unirank::cuda::solver {
namespace {

void enter(const Call& call, const char* kernel) { check(call, static_cast<cudaError_t>(mock::enter(kernel)), kernel); }

std::size_t bytes(std::int64_t count, std::size_t size) { return static_cast<std::size_t>(count) * size; }

}  // namespace

template <typename T>
void queue_scan(const Call& call, const T* a, std::int64_t B, std::int64_t m, std::int64_t n, bool upper,
                unsigned long long* found) {
  enter(call, "find_not_finite");
  const bool good = mock::expect(mock::on_device(a, bytes(B * m * n, sizeof(T))), "find_not_finite", "a") &&
                    mock::expect(mock::on_device(found, sizeof *found), "find_not_finite", "found");
  if (!good) return;
  const bool misses = mock::state().scans_that_miss > 0 && mock::state().scans_that_miss-- > 0;
  *found = misses ? 0 : static_cast<unsigned long long>(drivers::scan(sizeof(T) == 8, a, B, m, n, upper, {}));
}

template <typename T>
void queue_transpose(const Call& call, const T* source, std::int64_t n, T* target) {
  enter(call, "turn_square");
  if (mock::expect(mock::on_device(source, bytes(n * n, sizeof(T))), "turn_square", "source") &&
      mock::expect(mock::on_device(target, bytes(n * n, sizeof(T))), "turn_square", "target")) {
    drivers::transpose(sizeof(T) == 8, source, n, target, {});
  }
}

template void queue_scan<float>(const Call&, const float*, std::int64_t, std::int64_t, std::int64_t, bool,
                                unsigned long long*);
template void queue_scan<double>(const Call&, const double*, std::int64_t, std::int64_t, std::int64_t, bool,
                                 unsigned long long*);
template void queue_transpose<float>(const Call&, const float*, std::int64_t, float*);
template void queue_transpose<double>(const Call&, const double*, std::int64_t, double*);

}  // namespace unirank::cuda::solver
