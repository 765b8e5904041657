"""The ranks must be the same integers from the kernel, its twin, and a walk written straight from the rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import GOOD_RANKING, NO_SEGMENTS, PRICES_NEAR_INT64, SCHEMA_CHECKS, bad_rankings, random_problem
from tests.ops.tolerance import assert_same_bits_for_any_thread_count
from unirank import ops, reference


@dataclass(frozen=True)
class Problem:
    scores: list[list[float]]  # a list a segment, non-increasing
    cost: list[int]
    dense_cost: list[int]
    dtype: torch.dtype = torch.float64

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lengths = torch.tensor([0, *(len(s) for s in self.scores)])
        value = torch.tensor([v for s in self.scores for v in s], dtype=self.dtype)
        return (
            value,
            torch.tensor(self.cost, dtype=torch.int64),
            torch.tensor(self.dense_cost, dtype=torch.int64),
            lengths.cumsum(0),
        )

    def used(self, ranks: list[int]) -> int:
        return sum(min(r * c, d) for r, c, d in zip(ranks, self.cost, self.dense_cost, strict=True))


def naive(p: Problem, budget: int, min_rank: int, multiple_of: int) -> tuple[list[int], float] | None:
    """The walk, component by component; None where the floor costs more than the budget."""
    K = [len(s) for s in p.scores]

    def price(seg: int, r: int) -> int:
        return min(r * p.cost[seg], p.dense_cost[seg])

    def normalise(seg: int, r: int) -> int:
        return K[seg] if r * p.cost[seg] >= p.dense_cost[seg] else r

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
            if r * p.cost[seg] < p.dense_cost[seg] and r != floor[seg]:
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
    cost = [draw(st.integers(1, 9)) for _ in scores]
    # Below K * cost the dense cap bites, above it the segment was truncated by the caller.
    dense = [draw(st.integers(1, 2 * c * len(s))) for c, s in zip(cost, scores, strict=True)]
    return Problem([sorted(s, reverse=True) for s in scores], cost, dense, dtype)


@settings(max_examples=400, deadline=None)
@given(problems(), st.integers(0, 250), st.integers(0, 14), st.integers(1, 6))
def test_kernel_twin_and_walk_agree(p: Problem, budget: int, min_rank: int, multiple_of: int) -> None:
    want = naive(p, budget, min_rank, multiple_of)
    for op in (ops.global_topk, reference.global_topk):
        if want is None:
            with pytest.raises(
                ValueError, match=rf"min_rank {min_rank} needs \d+ parameters but the budget is {budget}"
            ):
                op(*p.tensors(), budget, min_rank, multiple_of)
            continue
        ranks, threshold = op(*p.tensors(), budget, min_rank, multiple_of)
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
        ranks, _ = ops.global_topk(*p.tensors(), budget, min_rank, 1)
        assert before is None or bool((ranks >= before).all())
        before = ranks


@pytest.mark.parametrize("multiple_of", [1, 8, 64])
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.8, 1.0])
def test_a_whole_model(keep: float, multiple_of: int) -> None:
    problem = random_problem(210, 480, levels=24000)
    budget = int(keep * int(problem[2].sum()))
    ranks, threshold = ops.global_topk(*problem, budget, 1, multiple_of)
    twin_ranks, twin_threshold = reference.global_topk(*problem, budget, 1, multiple_of)
    assert torch.equal(ranks, twin_ranks)
    assert torch.equal(threshold, twin_threshold)
    assert int(torch.minimum(ranks * problem[1], problem[2]).sum()) <= budget
    if keep == 1.0:
        assert torch.equal(ranks, torch.full_like(ranks, 480))


def test_prices_near_the_end_of_int64_do_not_overflow() -> None:
    for op in (ops.global_topk, reference.global_topk):
        ranks, _ = op(*PRICES_NEAR_INT64, 2**62 + 10, 0, 1)
        assert ranks.tolist() == [3, 1]


def test_no_segments() -> None:
    for op in (ops.global_topk, reference.global_topk):
        ranks, threshold = op(*NO_SEGMENTS, 5, 1, 1)
        assert ranks.shape == (0,)
        assert threshold == math.inf


def test_non_contiguous_inputs() -> None:
    problem = random_problem(8, 32, levels=1600)
    strided = [torch.stack((t, t), 1)[:, 0] for t in problem]
    for got, want in zip(ops.global_topk(*strided, 9000, 1, 4), ops.global_topk(*problem, 9000, 1, 4), strict=True):
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
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_opcheck(multiple_of: int, dtype: torch.dtype) -> None:
    arguments = (*random_problem(3, 10, dtype, levels=500), 500, 1, multiple_of)
    torch.library.opcheck(torch.ops.unirank.global_topk, arguments, test_utils=SCHEMA_CHECKS)


def test_compiles_into_one_graph() -> None:
    problem = random_problem(4, 16, levels=800)

    def spent(value: Tensor, cost: Tensor, dense_cost: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        ranks, threshold = ops.global_topk(value, cost, dense_cost, offsets, 1500, 1, 2)
        return torch.minimum(ranks * cost, dense_cost).sum(), threshold

    compiled = torch.compile(spent, fullgraph=True, backend="aot_eager")(*problem)
    assert compiled == spent(*problem)
