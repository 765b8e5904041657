"""The ranks must be the same integers from the kernel, its twin, and a walk written straight from the rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import (
    GOOD_RANKING,
    NO_SEGMENTS,
    PIVOTED_NEAR_INT64,
    PRICES_NEAR_INT64,
    SCHEMA_CHECKS,
    bad_rankings,
    random_problem,
)
from tests.ops.tolerance import assert_same_bits_for_any_thread_count
from unirank import ops, reference


@dataclass(frozen=True)
class Problem:
    scores: list[list[float]]  # a list a segment, non-increasing
    cost: list[int]
    dense_cost: list[int]
    dtype: torch.dtype = torch.float64
    pivoted: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lengths = torch.tensor([0, *(len(s) for s in self.scores)])
        value = torch.tensor([v for s in self.scores for v in s], dtype=self.dtype)
        return (
            value,
            torch.tensor(self.cost, dtype=torch.int64),
            torch.tensor(self.dense_cost, dtype=torch.int64),
            lengths.cumsum(0),
        )

    def uncapped(self, seg: int, r: int) -> int:
        return r * self.cost[seg] - (r * r if self.pivoted else 0)

    def used(self, ranks: list[int]) -> int:
        return sum(min(self.uncapped(seg, r), self.dense_cost[seg]) for seg, r in enumerate(ranks))


def naive(p: Problem, budget: int, min_rank: int, multiple_of: int) -> tuple[list[int], float] | None:
    """The walk, component by component; None where the floor costs more than the budget."""
    K = [len(s) for s in p.scores]

    def price(seg: int, r: int) -> int:
        return min(p.uncapped(seg, r), p.dense_cost[seg])

    def normalise(seg: int, r: int) -> int:
        return K[seg] if p.uncapped(seg, r) >= p.dense_cost[seg] else r

    def round_up(seg: int, r: int) -> int:
        rounded = math.ceil(r / multiple_of) * multiple_of
        return K[seg] if r >= K[seg] or rounded > K[seg] else rounded

    floor = [normalise(seg, round_up(seg, min(min_rank, k))) for seg, k in enumerate(K)]
    ranks, total, threshold = list(floor), p.used(floor), math.inf
    if total > budget:
        return None
    walk = sorted((-v, seg, i) for seg, s in enumerate(p.scores) for i, v in enumerate(s))
    for negative, seg, i in walk:
        if i < ranks[seg]:
            continue
        step = price(seg, i + 1) - price(seg, ranks[seg])
        if total + step > budget:
            break
        ranks[seg], total, threshold = i + 1, total + step, -negative
    if multiple_of > 1:
        for seg, r in enumerate(ranks):
            if p.uncapped(seg, r) < p.dense_cost[seg] and r != floor[seg]:
                ranks[seg] = max(floor[seg], r // multiple_of * multiple_of)
        left, closed = budget - p.used(ranks), set()
        for _, seg, i in walk:
            if i < ranks[seg] or seg in closed:
                continue
            target = normalise(seg, round_up(seg, ranks[seg] + 1))
            step = price(seg, target) - price(seg, ranks[seg])
            if step <= left:
                ranks[seg], left = target, left - step
            else:
                closed.add(seg)
    return [normalise(seg, r) for seg, r in enumerate(ranks)], threshold


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    few = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0])  # ties within and between segments
    any_float = st.floats(allow_nan=False, allow_infinity=False, width=32)
    one = draw(st.sampled_from([few, any_float]))
    scores = draw(st.lists(st.lists(one, min_size=1, max_size=12), max_size=6))
    pivoted = draw(st.booleans())
    cost = [draw(st.integers(1, 9)) + (2 * len(s) - 1 if pivoted else 0) for s in scores]
    # Below the price of rank K the dense cap bites, above it the segment was truncated by the caller.
    most = [len(s) * (c - len(s) if pivoted else c) for c, s in zip(cost, scores, strict=True)]
    dense = [draw(st.just(price) | st.integers(1, 2 * price)) for price in most]
    return Problem([sorted(s, reverse=True) for s in scores], cost, dense, dtype, pivoted)


@settings(max_examples=400, deadline=None)
@given(problems(), st.integers(0, 250) | st.floats(0, 1.1), st.integers(0, 14), st.integers(1, 6))
def test_kernel_twin_and_walk_agree(p: Problem, budget: float, min_rank: int, multiple_of: int) -> None:
    budget = int(budget * sum(p.dense_cost)) if isinstance(budget, float) else budget
    want = naive(p, budget, min_rank, multiple_of)
    for op in (ops.global_topk, reference.global_topk):
        if want is None:
            with pytest.raises(
                ValueError, match=rf"min_rank {min_rank} needs \d+ parameters but the budget is {budget}"
            ):
                op(*p.tensors(), budget, min_rank, multiple_of, p.pivoted)
            continue
        ranks, threshold = op(*p.tensors(), budget, min_rank, multiple_of, p.pivoted)
        assert (ranks.tolist(), threshold.item()) == want
        assert p.used(ranks.tolist()) <= budget
        assert ranks.dtype == torch.int64
        assert threshold.dtype == torch.float64
        assert threshold.shape == ()


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 3))
def test_ranks_never_fall_as_the_budget_grows(p: Problem, min_rank: int) -> None:
    before = None
    for budget in range(sum(p.dense_cost) + 2):
        if naive(p, budget, min_rank, 1) is None:
            continue
        ranks, _ = ops.global_topk(*p.tensors(), budget, min_rank, 1, p.pivoted)
        assert before is None or bool((ranks >= before).all())
        before = ranks


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("multiple_of", [1, 8, 64])
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.8, 1.0])
def test_a_whole_model(keep: float, multiple_of: int, pivoted: bool) -> None:
    problem = random_problem(210, 480, levels=24000)
    _, cost, dense_cost, _ = problem
    budget = int(keep * int(dense_cost.sum()))
    ranks, threshold = ops.global_topk(*problem, budget, 1, multiple_of, pivoted)
    twin_ranks, twin_threshold = reference.global_topk(*problem, budget, 1, multiple_of, pivoted)
    assert torch.equal(ranks, twin_ranks)
    assert torch.equal(threshold, twin_threshold)
    used = ranks * (cost - ranks if pivoted else cost)
    assert int(torch.minimum(used, dense_cost).sum()) <= budget
    if pivoted:
        assert int((used - dense_cost).max()) <= 0  # dense is rank K, which has the price of the dense matrix
    if keep == 1.0:
        assert torch.equal(ranks, torch.full_like(ranks, 480))


def test_prices_near_the_end_of_int64_do_not_overflow() -> None:
    for op in (ops.global_topk, reference.global_topk):
        ranks, _ = op(*PRICES_NEAR_INT64, 2**62 + 10, 0, 1)
        assert ranks.tolist() == [3, 1]


@pytest.mark.parametrize("op", [ops.global_topk, reference.global_topk])
def test_pivoted_prices_near_the_end_of_int64_do_not_overflow(op) -> None:
    for budget, rank in ((2**62 - 2, 0), (2**62 - 1, 1), (2**63 - 5, 1), (2**63 - 4, 2), (2**63 - 1, 3)):
        assert op(*PIVOTED_NEAR_INT64, budget, 0, 1, True)[0].tolist() == [rank]
    assert op(*PRICES_NEAR_INT64, 2**62 + 3, 0, 1, True)[0].tolist() == [3, 1]


@pytest.mark.parametrize("op", [ops.global_topk, reference.global_topk])
def test_every_rank_of_a_pivoted_matrix_can_be_bought(op) -> None:
    """[M, N] = [9, 8]: rank R costs R (17 - R), and every rank has its own price up to that of the dense matrix."""
    problem = torch.arange(8.0).flip(0), torch.tensor([17]), torch.tensor([72]), torch.tensor([0, 8])
    for rank in range(1, 9):
        price = rank * (17 - rank)
        assert op(*problem, price, 0, 1, True)[0].tolist() == [rank]
        assert op(*problem, price - 1, 0, 1, True)[0].tolist() == [rank - 1]
        # Two factors go no further than rank 4, where 68 numbers of 72 are spent.
        assert op(*problem, price, 0, 1)[0].tolist() == [8 if price == 72 else price // 17]


def test_no_segments() -> None:
    for op in (ops.global_topk, reference.global_topk):
        ranks, threshold = op(*NO_SEGMENTS, 5, 1, 1)
        assert ranks.shape == (0,)
        assert threshold == math.inf


def test_non_contiguous_inputs() -> None:
    problem = random_problem(8, 32, levels=1600)
    value, cost, dense_cost, offsets = (torch.stack((t, t), 1)[:, 0] for t in problem)
    strided = ops.global_topk(value, cost, dense_cost, offsets, 9000, 1, 4)
    for got, want in zip(strided, ops.global_topk(*problem, 9000, 1, 4), strict=True):
        assert torch.equal(got, want)


def test_bits_do_not_depend_on_threads() -> None:
    problem = random_problem(30, 100, levels=5000)
    assert_same_bits_for_any_thread_count(lambda: ops.global_topk(*problem, 100000, 1, 8))


@pytest.mark.parametrize("op", [ops.global_topk, reference.global_topk])
@bad_rankings
def test_bad_arguments(op, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**{**GOOD_RANKING, **changed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("multiple_of", "pivoted"), [(1, False), (4, False), (4, True)])
def test_opcheck(multiple_of: int, pivoted: bool, dtype: torch.dtype) -> None:
    arguments = (*random_problem(3, 10, dtype, levels=500), 500, 1, multiple_of, pivoted)
    torch.library.opcheck(torch.ops.unirank.global_topk, arguments, test_utils=SCHEMA_CHECKS)


def test_compiles_into_one_graph() -> None:
    problem = random_problem(4, 16, levels=800)

    def spent(value: Tensor, cost: Tensor, dense_cost: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        ranks, threshold = ops.global_topk(value, cost, dense_cost, offsets, 1500, 1, 2, pivoted=True)
        return torch.minimum(ranks * cost, dense_cost).sum(), threshold

    compiled = torch.compile(spent, fullgraph=True, backend="aot_eager")(*problem)
    assert compiled == spent(*problem)
