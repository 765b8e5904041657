// The torch side of batched_eigh and batched_svd on CUDA: checks, layouts, memory. The rest is in solver.h.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/solver.h"
#include "operands.h"

namespace unirank::cuda {
namespace {

using i64 = std::int64_t;

// Torch's caching allocator orders reuse by stream, so memory freed when the op returns is safe.
class TorchScratch final : public solver::Scratch {
 public:
  explicit TorchScratch(Tensor like) : like_(std::move(like)) {}

  void* device(std::size_t bytes) override {
    tensors_.push_back(torch::stable::new_empty(like_, {static_cast<i64>(bytes)}, ScalarType::Byte));
    return tensors_.back().mutable_data_ptr();
  }

  void* host(std::size_t bytes) override {
    buffers_.push_back(std::make_unique<std::byte[]>(bytes));
    return buffers_.back().get();
  }

 private:
  Tensor like_;
  std::vector<Tensor> tensors_;
  std::vector<std::unique_ptr<std::byte[]>> buffers_;
};

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor transposed(const Tensor& t) { return torch::stable::contiguous(torch::stable::transpose(t, 1, 2)); }

// A row-major lower half is a column-major upper half, and eigenvectors come back as rows.
template <typename T>
std::tuple<Tensor, Tensor> eigh(const solver::Call& call, const Tensor& a) {
  const i64 B = a.size(0), N = a.size(1);
  Tensor w = torch::stable::new_empty(a, {B, N}), v = torch::stable::new_empty(a, {B, N, N});
  solver::eigh<T>(call, B, N, const_data<T>(a), data<T>(w), data<T>(v));
  return {w, transposed(v)};
}

// cuSOLVER wants the longer side first, column-major. A wide row-major matrix is that already, as its own transpose
// Aᵀ = V S Uᵀ; a tall one is rewritten once. Either way `left`, the vectors of the longer side, and `right` are read
// row-major here, which transposes them: of U and Vh one comes out right and one is rewritten, for either side.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> svd(const solver::Call& call, const Tensor& a) {
  const i64 B = a.size(0), M = a.size(1), N = a.size(2);
  const bool tall = M > N;
  const i64 m = std::max(M, N), n = std::min(M, N);
  const Tensor columns = tall ? transposed(a) : torch::stable::contiguous(a);  // [B, n, m]: n columns of m
  Tensor s = torch::stable::new_empty(a, {B, n}), left = torch::stable::new_empty(a, {B, n, m}),
         right = torch::stable::new_empty(a, {B, n, n});
  solver::svd<T>(call, B, m, n, const_data<T>(columns), data<T>(s), data<T>(left), data<T>(right));
  // `left` now holds [n, m] rows that are left vectors, `right` the same.
  if (tall) return {transposed(left), s, right};
  return {transposed(right), s, left};
}

}  // namespace

std::tuple<Tensor, Tensor> batched_eigh(Tensor a) {
  const char* op = "batched_eigh";
  check_square_matrices(op, a);
  const i64 B = a.size(0), N = a.size(1);
  if (B == 0 || N == 0) return {torch::stable::new_empty(a, {B, N}), torch::stable::new_empty(a, {B, N, N})};
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  a = torch::stable::contiguous(a);
  TorchScratch scratch(a);
  const solver::Call call{op, a.get_device_index(), current_stream(a.get_device_index()), scratch};
  return a.scalar_type() == ScalarType::Double ? eigh<double>(call, a) : eigh<float>(call, a);
}

std::tuple<Tensor, Tensor, Tensor> batched_svd(Tensor a) {
  const char* op = "batched_svd";
  check_matrices(op, a);
  const i64 B = a.size(0), M = a.size(1), N = a.size(2), K = std::min(M, N);
  if (B == 0 || K == 0) {
    return {torch::stable::new_empty(a, {B, M, K}), torch::stable::new_empty(a, {B, K}),
            torch::stable::new_empty(a, {B, K, N})};
  }
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  TorchScratch scratch(a);
  const solver::Call call{op, a.get_device_index(), current_stream(a.get_device_index()), scratch};
  return a.scalar_type() == ScalarType::Double ? svd<double>(call, a) : svd<float>(call, a);
}

}  // namespace unirank::cuda

// The tests put a registration of their own in its place, to run this file on the CPU.
#ifndef UNIRANK_LINALG_REGISTRATION
#define UNIRANK_LINALG_REGISTRATION STABLE_TORCH_LIBRARY_IMPL
#endif

UNIRANK_LINALG_REGISTRATION(unirank, CUDA, m) {
  m.impl("batched_eigh", TORCH_BOX(&unirank::cuda::batched_eigh));
  m.impl("batched_svd", TORCH_BOX(&unirank::cuda::batched_svd));
}
