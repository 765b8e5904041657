// Entry points of the CPU kernels; their schemas stand in library.cpp, their meaning in unirank/reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace unirank::cpu {

using torch::stable::Tensor;

void cosine_accumulate_(Tensor state, Tensor x, Tensor y);
void gram_accumulate_(Tensor gram, Tensor mean, Tensor x);
std::tuple<Tensor, Tensor> batched_eigh(Tensor a);
std::tuple<Tensor, Tensor, Tensor> batched_svd(Tensor a);
std::tuple<Tensor, Tensor> global_topk(Tensor value, Tensor cost, Tensor dense_cost, Tensor offsets,
                                       std::int64_t budget, std::int64_t min_rank, std::int64_t multiple_of,
                                       bool pivoted);
void matmul_(Tensor out, Tensor a, Tensor b, double alpha, double beta);

}  // namespace unirank::cpu
