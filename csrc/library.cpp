#include <torch/csrc/stable/library.h>

#include "core/blas.h"
#include "cpu/ops.h"

STABLE_TORCH_LIBRARY(unirank, m) {
  m.def("cosine_accumulate_(Tensor(a!) state, Tensor x, Tensor y) -> ()");
  m.def("gram_accumulate_(Tensor(a!) gram, Tensor(b!) mean, Tensor x) -> ()");
  m.def("batched_eigh(Tensor a) -> (Tensor w, Tensor v)");
  m.def("batched_svd(Tensor a) -> (Tensor u, Tensor s, Tensor vh)");
  m.def(
      "global_topk(Tensor value, Tensor cost, Tensor dense_cost, Tensor offsets, int budget, int min_rank, "
      "int multiple_of, bool pivoted=False) -> (Tensor ranks, Tensor threshold)");
  m.def("matmul_(Tensor(a!) out, Tensor a, Tensor b, float alpha, float beta) -> ()");
  m.def("has_lapack() -> bool");
  m.def("has_mkl_products() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(unirank, CompositeExplicitAutograd, m) {
  m.impl("has_lapack", TORCH_BOX(&unirank::has_lapack));
  m.impl("has_mkl_products", TORCH_BOX(&unirank::has_mkl_products));
}

STABLE_TORCH_LIBRARY_IMPL(unirank, CPU, m) {
  m.impl("cosine_accumulate_", TORCH_BOX(&unirank::cpu::cosine_accumulate_));
  m.impl("gram_accumulate_", TORCH_BOX(&unirank::cpu::gram_accumulate_));
  m.impl("global_topk", TORCH_BOX(&unirank::cpu::global_topk));
  if (unirank::has_mkl_products()) m.impl("matmul_", TORCH_BOX(&unirank::cpu::matmul_));
  // Without a reachable LAPACK these stay free, and ops.py puts the torch compositions in their place.
  if (unirank::has_lapack()) {
    m.impl("batched_eigh", TORCH_BOX(&unirank::cpu::batched_eigh));
    m.impl("batched_svd", TORCH_BOX(&unirank::cpu::batched_svd));
  }
}
