"""A factor on the errors of early blocks, whose errors all later ones pass on (LEMS, ICML 2026)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from unirank.planning.allocator.base import Request
from unirank.planning.allocator.curves import Curve, scaled, solved
from unirank.planning.allocator.held_out import HeldOut
from unirank.planning.allocator.measure import workbench_of

_STAGE = "try depth factors"
_ALPHA, _GAMMA = 3.0, 7.0  # the largest of each; the least are 0
# Steps of the R2 sequence (Roberts, 2018), which covers a square evenly whatever its length.
_STEPS = (0.7548776662466927, 0.5698402909980532)


def depth_factors(layers: int, alpha: float, gamma: float) -> list[float]:
    """`d_b = 1 + gamma norm_b(Σ_{k >= b} (k + 1)^-alpha)` of every block, counted from 0 (method 4.1).

    `norm_b` divides by the largest, that of block 0 (**choice**).
    """
    terms = [(k + 1) ** -alpha for k in range(layers)]
    sums = [sum(terms[b:]) for b in range(layers)]
    return [1 + gamma * value / sums[0] for value in sums]


def with_depth(
    request: Request, curves: Sequence[Curve], held: HeldOut, tried: int
) -> tuple[list[Curve], dict[str, Any]]:
    """The curves times the depth factor whose plan has the least divergence of the whole model on held-out windows.

    Of `tried` candidates the first is gamma = 0, which changes nothing; the first half then covers [0, 3] x [0, 7] by a
    low-discrepancy sequence, the second half steps around the best so far, ever closer (**choice**). Of equal ones the
    first wins. Plans that were measured before are not measured again.

    Returns also alpha, gamma and the divergence of every candidate.
    """
    progress = workbench_of(request).progress
    known: dict[tuple[int, ...], float] = {}
    found: list[tuple[float, float, float]] = []  # divergence, alpha, gamma

    for alpha, gamma in _candidates(found, tried):
        progress(_STAGE, len(found), tried)
        ranks = tuple(solved(request, _with_factors(request, curves, alpha, gamma)))
        if ranks not in known:
            known[ranks] = held.divergence(ranks)
        found.append((known[ranks], alpha, gamma))
    progress(_STAGE, tried, tried)
    _, alpha, gamma = min(found, key=lambda entry: entry[0])
    return _with_factors(request, curves, alpha, gamma), {
        "alpha": alpha,
        "gamma": gamma,
        "depth_tried": [list(entry) for entry in found],
    }


def _with_factors(request: Request, curves: Sequence[Curve], alpha: float, gamma: float) -> list[Curve]:
    factors = depth_factors(request.linears[-1].layer + 1, alpha, gamma)
    return scaled(curves, [factors[spec.layer] for spec in request.linears])


def _candidates(found: Sequence[tuple[float, float, float]], tried: int) -> Iterator[tuple[float, float]]:
    """`(alpha, gamma)`, one after the other; reads what came of the earlier ones."""
    yield 0.0, 0.0
    half = tried // 2
    for i in range(1, half):
        yield _ALPHA * (i * _STEPS[0] % 1), _GAMMA * (i * _STEPS[1] % 1)
    for i in range(max(half, 1), tried):
        _, alpha, gamma = min(found, key=lambda entry: entry[0])
        near = 0.5 ** (1 + (i - half) / 4)
        a, g = ((i * step % 1) - 0.5 for step in _STEPS)
        yield min(max(alpha + near * _ALPHA * a, 0.0), _ALPHA), min(max(gamma + near * _GAMMA * g, 0.0), _GAMMA)
