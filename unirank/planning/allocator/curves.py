"""What is expected of every rank that a matrix may take: its cost, and its error, a curve through measured points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from unirank.disk.hashing import sha256_tensors
from unirank.planning.allocator.base import Request
from unirank.planning.allocator.knapsack import knapsack
from unirank.types import LinearSpec

_ROUNDING = 1e-12  # relative tails below this are rounding, to which nothing can be normalised
_LEAST_SLOPE = 0.1  # of that of all linears together
_TURNS = 20


@dataclass(frozen=True)
class Curve:
    """The legal ranks of one matrix, ascending, the last one K, which means dense.

    Attributes:
        ranks: int64 `[O]`.
        costs: parameters, int64 `[O]`, ascending.
        errors: expected divergence in nats, float64 `[O]`, non-increasing, the last one 0.
    """

    ranks: torch.Tensor
    costs: torch.Tensor
    errors: torch.Tensor

    def place(self, rank: int) -> int:
        """Index of the largest legal rank that is at most `rank`; 0 where none is."""
        return max(0, int(torch.searchsorted(self.ranks, rank, right=True)) - 1)


def relative_tail(energy: torch.Tensor) -> torch.Tensor:
    """Share of the energy beyond each rank 0 ... K: float64 `[K + 1]`; zeros for a matrix without energy."""
    beyond = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    return beyond / beyond[0] if beyond[0] > 0 else beyond


def measured_rank(spec: LinearSpec, energy: torch.Tensor, fraction: float) -> int:
    """`r0`: the rank at which a linear is measured alone."""
    rank = max(1, int(fraction * spec.params / spec.cost))
    visible = int((relative_tail(energy) > _ROUNDING).sum()) - 1
    return max(1, min(rank, visible))


def curves_through(request: Request, points: Mapping[str, int], measured: Mapping[str, float]) -> list[Curve]:
    """`error(r) = measured * tail(r) / tail(point)` for every linear, 0 where dense."""
    found = []
    for spec in request.linears:
        ranks = _legal_ranks(spec, request)
        tail = relative_tail(request.energies[spec.name])
        at_point = float(tail[points[spec.name]])
        errors = (measured[spec.name] / at_point if at_point > _ROUNDING else 0.0) * tail[ranks]
        errors[-1] = 0.0  # dense
        found.append(Curve(ranks, request.prices(spec)[ranks - 1], errors))
    return found


def solved(request: Request, curves: Sequence[Curve]) -> list[int]:
    """The ranks of least total error within the budget: see `knapsack`."""
    taken = knapsack([curve.costs for curve in curves], [curve.errors for curve in curves], request.budget)
    return [int(curve.ranks[index]) for curve, index in zip(curves, taken, strict=True)]


def scaled(curves: Sequence[Curve], factors: Sequence[float]) -> list[Curve]:
    """Errors times a factor of each matrix."""
    return [replace(curve, errors=curve.errors * factor) for curve, factor in zip(curves, factors, strict=True)]


def neighbours(curve: Curve, own: int, dense: int) -> tuple[int | None, int | None]:
    """The legal ranks nearest to a quarter below and above `own`, that differ from it and in error; None without.

    Args:
        dense: `LinearSpec.dense_rank`: a dense matrix counts as of this rank.
    """
    here = curve.place(own)
    rank = min(own, dense)
    below = curve.place(max(1, rank - max(1, rank // 4)))
    above = min(curve.place(rank + max(1, rank // 4)), len(curve.ranks) - 1) if here < len(curve.ranks) - 1 else here
    above = max(above, min(here + 1, len(curve.ranks) - 1))
    found = []
    for index in (below, above):
        usable = index != here and curve.errors[index] != curve.errors[here]
        found.append(int(curve.ranks[index]) if usable else None)
    return found[0], found[1]


def measured_scales(
    linears: Sequence[LinearSpec],
    curves: Sequence[Curve],
    own: Sequence[int],
    asked: Sequence[tuple[int | None, int | None]],
    rises: Sequence[float],
    drops: Sequence[float],
) -> torch.Tensor:
    """What scales each curve to two secants that were measured at its rank, float64 `[L]`.

    Measured over expected is mostly noise for one linear, and clear for linears of one kind, and of neighbouring
    layers (docs/experiments.md). So the scale is `s * kind * layer`, fitted to sums over each kind, and over each layer
    with its neighbours up to two layers off (weights 3, 2, 1), in turns. A linear's own ratio moves its scale by the
    weight `2 c / (1 + c)`, `c` the correlation over linears between what the fit leaves of the two secants, at least 0.
    No scale is below a tenth of `s`. All of this is a **choice**.

    Args:
        own: rank of each matrix in the plan.
        asked: see `neighbours`.
        rises: measured increase at the rank below, in nats.
        drops: measured decrease at the rank above.

    Where nothing was measured, or no rise at all, they are 1.
    """
    expected = torch.zeros(len(curves), 2, dtype=torch.float64)
    for row, (curve, rank, ranks) in enumerate(zip(curves, own, asked, strict=True)):
        for side, other in enumerate(ranks):
            if other is not None:
                expected[row, side] = (curve.errors[curve.place(other)] - curve.errors[curve.place(rank)]).abs()
    measured = torch.tensor([rises, drops], dtype=torch.float64).T.where(expected > 0, 0.0)
    x, y = expected.sum(1), measured.sum(1)
    if float(y.sum()) <= 0:
        return torch.ones_like(x)
    least = _LEAST_SLOPE * y.sum() / x.sum()
    kinds = list(dict.fromkeys(spec.kind for spec in linears))
    of_kind = torch.tensor([[float(spec.kind == kind) for spec in linears] for kind in kinds], dtype=torch.float64)
    layer = torch.tensor([spec.layer for spec in linears], dtype=torch.float64)
    near = (3 - (layer[:, None] - layer).abs()).clamp_min(0.0)
    by_kind = by_depth = torch.ones_like(x)
    for _ in range(_TURNS):
        by_kind = of_kind.T @ _ratio(of_kind @ y, of_kind @ (x * by_depth), least)
        by_depth = _ratio(near @ y, near @ (x * by_kind), least / by_kind.max())
    scale = (by_kind * by_depth).clamp_min(least)
    left = measured - scale[:, None] * expected
    both = (expected > 0).all(1)
    weight = 0.0
    if int(both.sum()) > 2:
        c = max(0.0, float(torch.corrcoef(left[both].T)[0, 1].nan_to_num()))
        weight = 2 * c / (1 + c)
    return (scale + weight * (_ratio(y, x, least) - scale).where(x > 0, 0.0)).clamp_min(least)


def _ratio(measured: torch.Tensor, expected: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """`measured / expected`, at least `least`; that too where nothing is expected."""
    return (measured / expected.clamp_min(1e-300)).clamp_min(least).where(expected > 0, least)


def digest_of(curves: Sequence[Curve]) -> str:
    """SHA-256 of everything in them."""
    named = ((str(i), tensor) for i, curve in enumerate(curves) for tensor in (curve.ranks, curve.costs, curve.errors))
    return sha256_tensors(named)


def _legal_ranks(spec: LinearSpec, request: Request) -> torch.Tensor:
    """Those that `min_rank` and `multiple_of` allow and that cost less than the dense matrix; and K for dense."""
    step = request.multiple_of
    least = -(-request.min_rank // step) * step
    return torch.tensor([*range(least, spec.dense_rank(request.form), step), spec.k])
