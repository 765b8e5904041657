"""Load unirank_cuda.so into a CUDA build of torch, on a machine without a GPU, and see every op registered."""

from __future__ import annotations

import sys

import torch

from unirank import ops

NAMES = ("cosine_accumulate_", "gram_accumulate_", "batched_eigh", "batched_svd", "global_topk")


def main() -> None:
    """Exit with a sentence where the library is absent or an op has no CUDA kernel."""
    if not ops.has_cuda_kernels():
        sys.exit(f"unirank_cuda.so is not loaded (torch {torch.__version__}, CUDA {torch.version.cuda})")
    for name in NAMES:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"unirank::{name}", "CUDA"):
            sys.exit(f"{name} has no CUDA kernel")
    print(f"unirank_cuda.so loads into torch {torch.__version__}; {len(NAMES)} ops are registered for CUDA")
    if torch.cuda.is_available():
        return
    try:
        ops.batched_eigh(torch.eye(3, device="cuda")[None])
    except (RuntimeError, AssertionError) as error:
        print(f"without a GPU a call ends in: {str(error).splitlines()[0]}")
    else:
        sys.exit("a call without a GPU succeeded")


if __name__ == "__main__":
    main()
