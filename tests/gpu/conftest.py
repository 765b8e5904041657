"""Every test here runs on a GPU: without one they skip, and under UNIRANK_REQUIRE_CUDA=1 they fail."""

from __future__ import annotations

import os

import pytest
import torch

from unirank import ops


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is usable"
    if not ops.has_cuda_kernels():
        return "unirank_cuda.so is not built, so the ops would run as torch compositions"
    return None


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU; asking for it is what makes a test skip or fail where there is none."""
    missing = _missing()
    if missing is not None:
        if os.environ.get("UNIRANK_REQUIRE_CUDA") == "1":
            pytest.fail(f"UNIRANK_REQUIRE_CUDA=1, but {missing}")
        pytest.skip(missing)
    return torch.device("cuda")
