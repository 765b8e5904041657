"""What this installation is and can do."""

from __future__ import annotations

from typing import Any

import torch

from unirank.analysis.scheme import schemes
from unirank.models.embedded import cache_root, embedded_package
from unirank.ops import cuda_kernels_missing
from unirank.planning.allocator import allocators
from unirank.provenance import meta


def build_info() -> dict[str, Any]:
    """Versions, devices, ops by kind of kernel, schemes, allocators, cache; JSON-ready."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    missing = cuda_kernels_missing()
    ops = ("cosine_accumulate_", "gram_accumulate_", "batched_eigh", "batched_svd", "global_topk")
    return meta("cpu") | {
        "gpus": gpus,
        "torch_cuda": torch.version.cuda,
        "native_ops": [name for name in ops if hasattr(torch.ops.unirank, name)],
        "cuda_kernels": f"none, the ops run as torch compositions on a GPU: {missing}"
        if missing
        else "unirank_cuda.so",
        "schemes": list(schemes()),
        "allocators": list(allocators()),
        "embedded_model": str(embedded_package() or "not installed"),
        "cache": str(cache_root()),
    }
