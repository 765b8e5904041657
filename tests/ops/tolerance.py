"""The one home of the ops' tolerance, and the inputs that their tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)
SIZES = (0, 1, 31, 32, 33, 255, 257)
SCHEMA_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def assert_as_good_as_torch(got: Tensor, plain: Tensor, truth: Tensor, *, ulps: float = 4) -> None:
    """Error against fp64 at most twice what plain torch makes in the same dtype.

    `ulps` of the largest true value, in the precision of `plain`, are granted to both: where torch happens to be exact
    the rule would ask for exactness.
    """
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    truth = truth.double()
    allowed = 2 * (plain.double() - truth).abs().max() + ulps * torch.finfo(plain.dtype).eps * truth.abs().max()
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e}"


def assert_same_bits_for_any_thread_count(run: Callable[[], Sequence[Tensor]]) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)


def token_mask(kind: str, T: int) -> Tensor | None:
    if kind == "absent":
        return None
    if kind == "some":
        return torch.arange(T) % 3 != 1
    return torch.full((T,), kind == "all")


masks = pytest.mark.parametrize("mask_kind", ["absent", "all", "none", "some"])
