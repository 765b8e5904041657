// The torch side of batched_eigh and batched_svd on CUDA: checks, layouts, memory. The rest is in solver.h.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/memory.h"
#include "cuda/solver.h"
#include "operands.h"

namespace unirank::cuda {
namespace {

using i64 = std::int64_t;

// Torch's caching allocator orders reuse by stream, so memory freed when the op returns is safe.
class TorchScratch final : public solver::Scratch {
 public:
  TorchScratch(const char* op, Tensor like) : op_(op), like_(std::move(like)) {}

  void* device(std::size_t bytes) override {
    tensors_.push_back(empty_bytes(op_, like_, static_cast<i64>(bytes)));
    return tensors_.back().mutable_data_ptr();
  }

  void* host(std::size_t bytes) override {
    buffers_.emplace_back(new (std::nothrow) std::byte[bytes]);
    return buffers_.back().get();
  }

 private:
  const char* op_;
  Tensor like_;
  std::vector<Tensor> tensors_;
  std::vector<std::unique_ptr<std::byte[]>> buffers_;
};

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor transposed(const char* op, const Tensor& t) { return contiguous(op, torch::stable::transpose(t, 1, 2)); }

// A row-major lower half is a column-major upper half, and eigenvectors come back as rows.
template <typename T>
std::tuple<Tensor, Tensor> eigh(const solver::Call& call, const Tensor& a) {
  const i64 B = a.size(0), N = a.size(1);
  Tensor w = empty(call.op, a, {B, N}), v = empty(call.op, a, {B, N, N});
  solver::eigh<T>(call, B, N, const_data<T>(a), data<T>(w), data<T>(v));
  return {w, transposed(call.op, v)};
}

// cuSOLVER wants the longer side first, column-major. A wide row-major matrix is that already, as its own transpose
// Aᵀ = V S Uᵀ; a tall one is rewritten once. Either way `left`, the vectors of the longer side, and `right` are read
// row-major here, which transposes them: of U and Vh one comes out right and one is rewritten, for either side.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> svd(const solver::Call& call, const Tensor& a) {
  const i64 B = a.size(0), M = a.size(1), N = a.size(2);
  const bool tall = M > N;
  const i64 m = std::max(M, N), n = std::min(M, N);
  const Tensor columns = tall ? transposed(call.op, a) : contiguous(call.op, a);  // [B, n, m]: n columns of m
  Tensor s = empty(call.op, a, {B, n}), left = empty(call.op, a, {B, n, m}), right = empty(call.op, a, {B, n, n});
  solver::svd<T>(call, B, m, n, const_data<T>(columns), data<T>(s), data<T>(left), data<T>(right));
  // `left` now holds [n, m] rows that are left vectors, `right` the same.
  if (tall) return {transposed(call.op, left), s, right};
  return {transposed(call.op, right), s, left};
}

}  // namespace

std::tuple<Tensor, Tensor> batched_eigh(Tensor a) {
  const char* op = "batched_eigh";
  check_square_matrices(op, a);
  const i64 B = a.size(0), N = a.size(1);
  if (B == 0 || N == 0) return {empty(op, a, {B, N}), empty(op, a, {B, N, N})};
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  a = contiguous(op, a);
  TorchScratch scratch(op, a);
  const solver::Call call{op, a.get_device_index(), current_stream(a.get_device_index()), scratch};
  return a.scalar_type() == ScalarType::Double ? eigh<double>(call, a) : eigh<float>(call, a);
}

std::tuple<Tensor, Tensor, Tensor> batched_svd(Tensor a) {
  const char* op = "batched_svd";
  check_matrices(op, a);
  const i64 B = a.size(0), M = a.size(1), N = a.size(2), K = std::min(M, N);
  if (B == 0 || K == 0) return {empty(op, a, {B, M, K}), empty(op, a, {B, K}), empty(op, a, {B, K, N})};
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  TorchScratch scratch(op, a);
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
