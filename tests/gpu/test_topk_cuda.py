"""global_topk on the GPU must give the very same integers as on the CPU, and the same bits of the threshold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import (
    GOOD_RANKING,
    NO_SEGMENTS,
    PIVOTED_NEAR_INT64,
    PRICES_NEAR_INT64,
    Problem,
    bad_rankings,
    random_problem,
)
from unirank import ops


def assert_same(
    device: torch.device, problem: Problem, budget: int, min_rank: int, multiple_of: int, pivoted: bool = False
) -> None:
    want = ops.global_topk(*problem, budget, min_rank, multiple_of, pivoted)
    value, cost, dense_cost, offsets = (t.to(device) for t in problem)
    got = ops.global_topk(value, cost, dense_cost, offsets, budget, min_rank, multiple_of, pivoted)
    for g, w in zip(got, want, strict=True):
        assert g.is_cuda
        assert torch.equal(g.cpu(), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 7, 8, 64])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("pivoted", [False, True])
def test_a_whole_model(
    cuda: torch.device, pivoted: bool, keep: float, multiple_of: int, ties: bool, dtype: torch.dtype
) -> None:
    problem = random_problem(210, 480, dtype, levels=50 if ties else None)
    assert_same(cuda, problem, int(keep * int(problem[2].sum())), 1, multiple_of, pivoted)


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("pivoted", [False, True])
def test_small_problems(cuda: torch.device, pivoted: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    L, K, multiple_of = (int(torch.randint(1, n, (1,), generator=g)) for n in (7, 40, 6))
    problem = random_problem(L, K, levels=50, seed=seed)
    for keep in (0.3, 0.5, 0.7, 1.0):
        assert_same(cuda, problem, int(keep * int(problem[2].sum())), 0, multiple_of, pivoted)


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
    assert_same(cuda, PRICES_NEAR_INT64, 2**62 + 10, 0, 1)
    assert_same(cuda, PRICES_NEAR_INT64, 2**62 + 3, 0, 1, pivoted=True)
    for budget in (2**62 - 2, 2**62 - 1, 2**63 - 5, 2**63 - 4, 2**63 - 1):
        assert_same(cuda, PIVOTED_NEAR_INT64, budget, 0, 1, pivoted=True)


def test_no_segments(cuda: torch.device) -> None:
    assert_same(cuda, NO_SEGMENTS, 5, 1, 1)


@bad_rankings
def test_bad_arguments(cuda: torch.device, changed: dict, message: str) -> None:
    arguments = {k: v.to(cuda) if isinstance(v, Tensor) else v for k, v in {**GOOD_RANKING, **changed}.items()}
    with pytest.raises(ValueError, match=message):
        ops.global_topk(**arguments)
