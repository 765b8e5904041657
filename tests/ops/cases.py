"""Inputs and calls that the tests of the ops share, on the CPU, on the GPU and under the mock."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64)
SIZES = (0, 1, 31, 32, 33, 255, 257)
SCHEMA_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


# --- cosine_accumulate_ and gram_accumulate_ ------------------------------------------------------------------------


def activations(T: int, N: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(T, N, generator=torch.Generator().manual_seed(T * 1000 + N + seed)).to(dtype)


def run_cosine(op, x: Tensor, y: Tensor) -> Tensor:
    """The state after one call on the device of x, on the CPU."""
    state = torch.zeros(3, dtype=torch.float64, device=x.device)
    op(state, x, y)
    return state.cpu()


def run_gram(op, x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The gram and the mean after one call on the device of x, on the CPU."""
    N = x.shape[1]
    gram, mean = (torch.zeros(shape, dtype=dtype, device=x.device) for shape in ((N, N), (N,)))
    op(gram, mean, x)
    return gram.cpu(), mean.cpu()


# --- batched_eigh and batched_svd -----------------------------------------------------------------------------------


def matrices(B: int, M: int, N: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, M, N, generator=torch.Generator().manual_seed(M * 1000 + N), dtype=torch.float64).to(dtype)


def symmetric(B: int, N: int, dtype: torch.dtype) -> Tensor:
    a = matrices(B, N, N, torch.float64)
    return (a + a.mT).to(dtype)


# --- global_topk ----------------------------------------------------------------------------------------------------

Problem = tuple[Tensor, Tensor, Tensor, Tensor]  # value, cost, dense_cost, offsets


def random_problem(
    L: int, K: int, dtype: torch.dtype = torch.float64, *, levels: int | None = None, seed: int = 0
) -> Problem:
    """L segments of K scores; `levels`: on how many steps they lie (ties), None: not rounded."""
    g = torch.Generator().manual_seed(L * 1000 + K + seed)
    value = torch.rand(L, K, generator=g, dtype=dtype)
    if levels is not None:
        value = value.mul(levels).round()
    value = value.sort(1, descending=True).values.flatten()
    M, N = torch.randint(K, 3 * K + 1, (L,), generator=g), torch.full((L,), K)
    return value, M + N, M * N, torch.arange(L + 1) * K


PRICES_NEAR_INT64: Problem = (
    torch.tensor([3.0, 2, 1, 0.5]),
    torch.tensor([2**62 - 1, 5]),
    torch.tensor([2**62 - 1, 2**60]),
    torch.tensor([0, 3, 4]),
)
# Pivoted, rank 2 costs 2^63 - 4, and the product of rank 3 does not fit.
PIVOTED_NEAR_INT64: Problem = (
    torch.tensor([3.0, 2, 1]),
    torch.tensor([2**62]),
    torch.tensor([2**63 - 1]),
    torch.tensor([0, 3]),
)
_NONE = torch.zeros(0, dtype=torch.int64)
NO_SEGMENTS: Problem = (torch.zeros(0), _NONE, _NONE, torch.zeros(1, dtype=torch.int64))

GOOD_RANKING = {
    "value": torch.tensor([3.0, 1, 2, 0]),
    "cost": torch.tensor([5, 5]),
    "dense_cost": torch.tensor([9, 9]),
    "offsets": torch.tensor([0, 2, 4]),
    "budget": 15,
    "min_rank": 1,
    "multiple_of": 1,
}
# What makes it illegal, and what the op says then.
bad_rankings = pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": torch.zeros(4).half()}, "value must be float32 or float64, got"),
        ({"value": torch.zeros(4, 1)}, r"value must have shape \[C\], got \[4, 1\]"),
        ({"value": torch.tensor([3.0, 1, 2, math.nan])}, "value must be finite.*index.*3"),
        ({"value": torch.tensor([math.inf, 1, 2, 0])}, "value must be finite.*index.*0"),
        ({"value": torch.tensor([3.0, 1, 0, 2])}, "rises at index 3 in segment 1"),
        ({"cost": torch.tensor([5, 0])}, "cost must be positive.*segment.*1"),
        ({"cost": torch.tensor([5.0, 5.0])}, "cost must be int64"),
        ({"dense_cost": torch.tensor([-9, 9])}, "dense_cost must be positive.*segment.*0"),
        ({"dense_cost": torch.tensor([9])}, r"dense_cost must have shape \[2\], got \[1\]"),
        ({"dense_cost": torch.tensor([2**62, 2**62])}, "more than an int64"),
        ({"offsets": torch.tensor([0, 4])}, r"offsets must have shape \[3\]"),
        ({"offsets": torch.tensor([0, 2, 3])}, "offsets must run from 0 to 4, got 0 to 3"),
        ({"offsets": torch.tensor([0, 4, 4])}, "offsets must increase, but segment.*1"),
        (
            {"cost": torch.tensor([5, 3]), "pivoted": True},
            "global_topk: with pivoted=True, cost must be at least twice a segment's length, got cost 3 and length 2 "
            "at segment 1",
        ),
        ({"min_rank": -1}, "min_rank must be at least 0, got -1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"budget": 9}, "min_rank 1 needs 10 parameters but the budget is 9"),
    ],
)
