"""Tests that run on a GPU. Without one they are not collected; under UNIRANK_REQUIRE_CUDA=1 they are, and fail."""

from __future__ import annotations

import os

import pytest
import torch

from unirank import ops


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is usable"
    return ops.cuda_kernels_missing()


# Hundreds of skipped tests would hide the one that matters.
collect_ignore_glob = ["test_*.py"] if _missing() and os.environ.get("UNIRANK_REQUIRE_CUDA") != "1" else []


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU; asking for it is what makes a test fail where there is none."""
    if missing := _missing():
        pytest.fail(f"UNIRANK_REQUIRE_CUDA=1, but {missing}")
    return torch.device("cuda")
