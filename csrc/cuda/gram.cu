#include <algorithm>
#include <type_traits>

#include "cuda/blas_handle.h"
#include "cuda/launch.h"
#include "cuda/ops.h"
#include "kernels/gram.cuh"

namespace unirank::cuda {
namespace {

constexpr const char* kOp = "gram_accumulate_";

// Only here: mirror_lower has a row of blocks for every kTile rows, and a grid holds at most 65535 of them.
constexpr i64 kMaxFeatures = i64{1} << 20;

template <typename In>
constexpr cudaDataType_t kType = std::is_same_v<In, double>          ? CUDA_R_64F
                                 : std::is_same_v<In, float>         ? CUDA_R_32F
                                 : std::is_same_v<In, kernels::Bf16> ? CUDA_R_16BF
                                                                     : CUDA_R_16F;

// The product that accumulate_gram asks for. To cuBLAS, row-major x is the column-major [N, T] matrix, and the panel
// of rows first..last of the gram is the [last, last - first] matrix x[:last] x[first:last]ᵀ.
struct Multiply {
  cublasHandle_t handle;

  template <typename In, typename C>
  void operator()(const In* x, i64 stride, i64 T, i64 first, i64 last, int accumulate, C* out, i64 ld) const {
    const C one = 1, beta = static_cast<C>(accumulate);
    const auto compute = std::is_same_v<C, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    check_blas(kOp,
               cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_T, int(last), int(last - first), int(T), &one, x, kType<In>,
                            int(stride), x + first, kType<In>, int(stride), &beta, out, kType<C>, int(ld), compute,
                            CUBLAS_GEMM_DEFAULT),
               "cublasGemmEx");
  }
};

template <typename In, typename Acc>
void accumulate(const Tensor& gram, const Tensor& mean, const Tensor& x) {
  using Buffers = kernels::GramScratch<In, Acc>;
  const i64 T = x.size(0), N = x.size(1);
  const Queue queue(x);
  Scratch scratch(kOp, x);
  const Buffers buffers{
      scratch.take<double>(kernels::kMaxSlices * N),
      Buffers::widens ? scratch.take<kernels::Compute<In>>(std::min(kernels::kPanel, N) * N) : nullptr,
  };
  const Multiply multiply{thread_blas_handle(kOp, x.get_device_index(), queue.stream())};
  kernels::accumulate_gram(queue, multiply, kernels::Rows<In>{const_data<In>(x), x.stride(0), T, N}, buffers,
                           data<Acc>(gram), data<Acc>(mean));
}

template <typename In>
void accumulate(const Tensor& gram, const Tensor& mean, const Tensor& x) {
  if (gram.scalar_type() == ScalarType::Double) return accumulate<In, double>(gram, mean, x);
  return accumulate<In, float>(gram, mean, x);
}

}  // namespace

void gram_accumulate_(Tensor gram, Tensor mean, Tensor x) {
  check_tokens(kOp, x);
  const i64 N = x.size(1);
  check(N <= kMaxFeatures, kOp, ": N must be at most ", kMaxFeatures, ", got ", N);
  check_moments(kOp, gram, mean, N);
  check_device(kOp, "gram", gram, x);
  check_device(kOp, "mean", mean, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (x.size(0) == 0 || N == 0) return;
  x = with_rows(kOp, x);
  with_element_type<kernels::Bf16, kernels::Fp16>(x.scalar_type(),
                                                  [&]<typename In>() { accumulate<In>(gram, mean, x); });
}

}  // namespace unirank::cuda
