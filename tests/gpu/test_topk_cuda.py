"""global_topk on the GPU must give the very same integers as on the CPU, and the same bits of the threshold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unirank import ops

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def random_problem(L: int, K: int, dtype: torch.dtype, ties: bool, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(L * 1000 + K + seed)
    value = torch.rand(L, K, generator=g, dtype=dtype)
    if ties:
        value = value.mul(50).round()
    value = value.sort(1, descending=True).values.flatten()
    M, N = torch.randint(K, 3 * K + 1, (L,), generator=g), torch.full((L,), K)
    return value, M + N, M * N, torch.arange(L + 1) * K


def assert_same(device: torch.device, problem: Problem, budget: int, min_rank: int, multiple_of: int) -> None:
    want = ops.global_topk(*problem, budget, min_rank, multiple_of)
    got = ops.global_topk(*(t.to(device) for t in problem), budget, min_rank, multiple_of)
    for g, w in zip(got, want, strict=True):
        assert g.is_cuda
        assert torch.equal(g.cpu(), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 7, 8, 64])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4, 0.8, 1.0])
def test_a_whole_model(cuda: torch.device, keep: float, multiple_of: int, ties: bool, dtype: torch.dtype) -> None:
    problem = random_problem(210, 480, dtype, ties)
    assert_same(cuda, problem, int(keep * int(problem[2].sum())), 1, multiple_of)


@pytest.mark.parametrize("seed", range(50))
def test_small_problems(cuda: torch.device, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    L, K, multiple_of = (int(torch.randint(1, n, (1,), generator=g)) for n in (7, 40, 6))
    problem = random_problem(L, K, torch.float64, True, seed)
    for keep in (0.3, 0.5, 0.7, 1.0):
        assert_same(cuda, problem, int(keep * int(problem[2].sum())), 0, multiple_of)


def test_signed_zeros_tie(cuda: torch.device) -> None:
    problem = (
        torch.tensor([0.0, -0.0, -0.0, 0.0]),
        torch.tensor([2, 2]),
        torch.tensor([9, 9]),
        torch.tensor([0, 2, 4]),
    )
    for budget in range(9):
        assert_same(cuda, problem, budget, 0, 1)


def test_prices_near_the_end_of_int64(cuda: torch.device) -> None:
    huge = 2**62 - 1
    offsets = torch.tensor([0, 3, 4])
    problem = (torch.tensor([3.0, 2, 1, 0.5]), torch.tensor([huge, 5]), torch.tensor([huge, 2**60]), offsets)
    assert_same(cuda, problem, 2**62 + 10, 0, 1)


def test_no_segments(cuda: torch.device) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert_same(cuda, (torch.zeros(0), empty, empty, torch.zeros(1, dtype=torch.int64)), 5, 1, 1)


GOOD = {
    "value": torch.tensor([3.0, 1, 2, 0]),
    "cost": torch.tensor([5, 5]),
    "dense_cost": torch.tensor([9, 9]),
    "offsets": torch.tensor([0, 2, 4]),
    "budget": 15,
    "min_rank": 1,
    "multiple_of": 1,
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"value": torch.zeros(4).half()}, "value must be float32 or float64, got"),
        ({"value": torch.tensor([3.0, 1, 2, math.nan])}, "value must be finite.*index.*3"),
        ({"value": torch.tensor([3.0, 1, 0, 2])}, "rises at index 3 in segment 1"),
        ({"cost": torch.tensor([5, 0])}, "cost must be positive.*segment.*1"),
        ({"dense_cost": torch.tensor([-9, 9])}, "dense_cost must be positive.*segment.*0"),
        ({"dense_cost": torch.tensor([2**62, 2**62])}, "more than an int64"),
        ({"offsets": torch.tensor([0, 2, 3])}, "offsets must run from 0 to 4, got 0 to 3"),
        ({"offsets": torch.tensor([0, 4, 4])}, "offsets must increase, but segment.*1"),
        ({"min_rank": -1}, "min_rank must be at least 0, got -1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"budget": 9}, "min_rank 1 needs 10 parameters but the budget is 9"),
    ],
)
def test_bad_arguments(cuda: torch.device, changed: dict, message: str) -> None:
    arguments = {k: v.to(cuda) if isinstance(v, Tensor) else v for k, v in {**GOOD, **changed}.items()}
    with pytest.raises(ValueError, match=message):
        ops.global_topk(**arguments)
