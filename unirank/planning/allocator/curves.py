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
_LEAST_SLOPE = 0.1  # of the median


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


def by_layer(curves: Sequence[Curve], linears: Sequence[LinearSpec], factors: Sequence[float]) -> list[Curve]:
    """Errors times the factor of their layer."""
    return [
        replace(curve, errors=curve.errors * factors[spec.layer]) for curve, spec in zip(curves, linears, strict=True)
    ]


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


def refitted(
    curves: Sequence[Curve],
    own: Sequence[int],
    asked: Sequence[tuple[int | None, int | None]],
    rises: Sequence[float],
    drops: Sequence[float],
) -> list[Curve]:
    """Curves whose drops below and above `own` are scaled to two secants that were measured there.

    A secant's slope is what was measured over what the curve expects; noise can make it 0 or negative, so the least
    is a tenth of the median (**choice**). Where one secant is missing the other serves for both, where both are, the
    median.

    Args:
        own: rank of each matrix in the plan.
        asked: see `neighbours`.
        rises: measured increase at the rank below, in nats.
        drops: measured decrease at the rank above.
    """
    slopes: list[list[float | None]] = []
    for curve, rank, (below, above), rise, drop in zip(curves, own, asked, rises, drops, strict=True):
        here = float(curve.errors[curve.place(rank)])
        pair: list[float | None] = [None, None]
        if below is not None:
            pair[0] = rise / (float(curve.errors[curve.place(below)]) - here)
        if above is not None:
            pair[1] = drop / (here - float(curve.errors[curve.place(above)]))
        slopes.append(pair)
    known = [slope for pair in slopes for slope in pair if slope is not None]
    if not known:
        return list(curves)
    median = max(0.0, float(torch.tensor(known, dtype=torch.float64).median()))
    found = []
    for curve, rank, (low, high) in zip(curves, own, slopes, strict=True):
        low = high if low is None else low
        high = low if high is None else high
        under, over = (max(median if slope is None else slope, _LEAST_SLOPE * median) for slope in (low, high))
        here = curve.place(rank)
        level = curve.errors[here]
        scaled = over * curve.errors
        scaled[:here] = over * level + under * (curve.errors[:here] - level)
        found.append(replace(curve, errors=scaled))
    return found


def digest_of(curves: Sequence[Curve]) -> str:
    """SHA-256 of everything in them."""
    named = ((str(i), tensor) for i, curve in enumerate(curves) for tensor in (curve.ranks, curve.costs, curve.errors))
    return sha256_tensors(named)


def _legal_ranks(spec: LinearSpec, request: Request) -> torch.Tensor:
    """Those that `min_rank` and `multiple_of` allow and that cost less than the dense matrix; and K for dense."""
    step = request.multiple_of
    least = -(-request.min_rank // step) * step
    return torch.tensor([*range(least, spec.dense_rank(request.form), step), spec.k])
