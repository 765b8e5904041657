// Our own kernels around cuSOLVER, free of torch: whether matrices are finite, and square ones turned over.
#pragma once

#include "cuda/solver.h"

namespace unirank::cuda::solver {

// Queues *found = B - (index of the first matrix that is not finite), or 0; column-major packed [B, n, m], of which
// `upper` looks at i <= j only. Throws std::runtime_error where the launch fails.
template <typename T>
void queue_scan(const Call& call, const T* a, std::int64_t B, std::int64_t m, std::int64_t n, bool upper,
                unsigned long long* found);

// Queues target = sourceᵀ, both [n, n].
template <typename T>
void queue_transpose(const Call& call, const T* source, std::int64_t n, T* target);

}  // namespace unirank::cuda::solver
