#include "cuda/matrices.h"

#include "cuda/solver_handle.h"
#include "kernels/matrices.cuh"

namespace unirank::cuda::solver {
namespace {

struct Launch {
  const Call& call;
  const char* name;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) const {
    kernel<<<grid, block, 0, call.stream>>>(arguments...);
    check(call, cudaGetLastError(), name);
  }
};

}  // namespace

template <typename T>
void queue_scan(const Call& call, const T* a, std::int64_t B, std::int64_t m, std::int64_t n, bool upper,
                unsigned long long* found) {
  check(call, cudaMemsetAsync(found, 0, sizeof *found, call.stream), "cudaMemsetAsync");
  kernels::scan_matrices(Launch{call, "find_not_finite"}, a, B, m, n, upper, found);
}

template <typename T>
void queue_transpose(const Call& call, const T* source, std::int64_t n, T* target) {
  kernels::transpose_square(Launch{call, "turn_square"}, source, n, target);
}

template void queue_scan<float>(const Call&, const float*, std::int64_t, std::int64_t, std::int64_t, bool,
                                unsigned long long*);
template void queue_scan<double>(const Call&, const double*, std::int64_t, std::int64_t, std::int64_t, bool,
                                 unsigned long long*);
template void queue_transpose<float>(const Call&, const float*, std::int64_t, float*);
template void queue_transpose<double>(const Call&, const double*, std::int64_t, double*);

}  // namespace unirank::cuda::solver
