"""The multiple-choice knapsack of matrix rules: one option for each matrix, least total error within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import torch


def knapsack(costs: Sequence[torch.Tensor], errors: Sequence[torch.Tensor], budget: int) -> list[int]:
    """The index of the option taken of each matrix, of total cost at most `budget`.

    Greedy on the lower convex hulls: every matrix starts at its first option; the hull segment with the largest drop
    of error per unit of cost is taken, if it still fits, and offers the next one of its matrix. Ties go to the earlier
    matrix. Up to the first segment that does not fit this is the optimum of the relaxed problem (its LP bound), so
    the total error exceeds the optimum by less than that one segment's drop; going on with the segments that fit
    lowers it further. What is then left is filled option by option, steepest first, hull or not.

    Args:
        costs: int64 `[O]` of each matrix, strictly ascending. The first options must fit the budget together.
        errors: float64 `[O]`, non-increasing.
    """
    hulls = [lower_hull(cost.tolist(), error.tolist()) for cost, error in zip(costs, errors, strict=True)]
    taken = [0] * len(costs)
    left = budget - sum(int(cost[0]) for cost in costs)
    left = _climb(taken, hulls, costs, errors, left)
    _climb(taken, [list(range(len(cost))) for cost in costs], costs, errors, left)
    return taken


def _climb(
    taken: list[int],
    ladders: Sequence[list[int]],
    costs: Sequence[torch.Tensor],
    errors: Sequence[torch.Tensor],
    left: int,
) -> int:
    """Raise `taken` in place along `ladders` (option indices), steepest step first; returns what is left."""
    cost = [values.tolist() for values in costs]
    error = [values.tolist() for values in errors]

    def step(matrix: int, rung: int) -> tuple[float, int, int] | None:
        if rung + 1 == len(ladders[matrix]):
            return None
        a, b = ladders[matrix][rung], ladders[matrix][rung + 1]
        return -(error[matrix][a] - error[matrix][b]) / (cost[matrix][b] - cost[matrix][a]), matrix, rung

    first = (step(matrix, ladder.index(taken[matrix])) for matrix, ladder in enumerate(ladders))
    heap = [entry for entry in first if entry is not None]
    heapify(heap)
    while heap:
        _, matrix, rung = heappop(heap)
        option = ladders[matrix][rung + 1]
        price = cost[matrix][option] - cost[matrix][taken[matrix]]
        if price > left:
            continue
        left -= price
        taken[matrix] = option
        if (following := step(matrix, rung + 1)) is not None:
            heappush(heap, following)
    return left


def lower_hull(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Indices of the points on the lower convex hull of error over cost, first and last included."""
    hull: list[int] = []
    for index in range(len(costs)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (errors[a] - errors[b]) * (costs[index] - costs[a])
            if before > (errors[a] - errors[index]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(index)
    return hull
