#include "cuda/solver.h"
#include "cuda/solver_batch.h"

namespace unirank::cuda::solver {

template <typename T>
void eigh(const Call& call, std::int64_t B, std::int64_t n, const T* a, T* w, T* v) {
  constexpr auto kRoutine = "cusolverDnXsyevBatched";
  Outcome<T> outcome(B, n);
  settle_on_failure(call, [&] {
    const cusolverDnHandle_t handle = thread_handle(call);
    const Params params(call);
    require_finite(call, a, {0, B}, n, n, true);
    int* info = allocate_info(call, B);
    // cuSOLVER overwrites the matrices with the vectors.
    copy_on_device(call, v, a, B * n * n);
    Workspace work(call);
    in_chunks(
        B, chunk_length(n * n * static_cast<std::int64_t>(sizeof(T))), [&](std::int64_t first, std::int64_t count) {
          T *matrices = v + first * n * n, *values = w + first * n;
          std::size_t device_bytes = 0, host_bytes = 0;
          check(call,
                cusolverDnXsyevBatched_bufferSize(handle, params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_UPPER, n,
                                                  Api<T>::type, matrices, n, Api<T>::type, values, Api<T>::type,
                                                  &device_bytes, &host_bytes, count),
                "cusolverDnXsyevBatched_bufferSize", {first, count});
          work.reserve(device_bytes, host_bytes);
          const cusolverStatus_t status =
              cusolverDnXsyevBatched(handle, params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_UPPER, n, Api<T>::type,
                                     matrices, n, Api<T>::type, values, Api<T>::type, work.device(),
                                     work.device_bytes(), work.host(), work.host_bytes(), info + first, count);
          check_solver(call, status, kRoutine, {first, count}, info, a, n, n, true);
        });
    outcome.read(call, info, w);
    check_outcome(call, outcome, a, n, n, true);
  });
}

template void eigh<float>(const Call&, std::int64_t, std::int64_t, const float*, float*, float*);
template void eigh<double>(const Call&, std::int64_t, std::int64_t, const double*, double*, double*);

}  // namespace unirank::cuda::solver
