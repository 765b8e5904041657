#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

// batched_eigh and batched_svd are registered beside their definitions, in linalg.cu.
STABLE_TORCH_LIBRARY_IMPL(unirank, CUDA, m) {
  m.impl("cosine_accumulate_", TORCH_BOX(&unirank::cuda::cosine_accumulate_));
  m.impl("gram_accumulate_", TORCH_BOX(&unirank::cuda::gram_accumulate_));
  m.impl("global_topk", TORCH_BOX(&unirank::cuda::global_topk));
}
