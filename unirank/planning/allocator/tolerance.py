"""`tolerance`: one relative truncation error for every matrix (PGSVD, arXiv 2510.05544)."""

from __future__ import annotations

from unirank.planning.allocator.base import Allocator, Request, take_best
from unirank.planning.score import assemble


def allocate(request: Request) -> tuple[list[int], float | None]:
    """The least ranks with `Σ_{i>r} p_i <= eps²` in every matrix, `p_i = sigma_i² / Σ sigma²`; eps fits the budget.

    Component i is needed while what remains without it, `Σ_{j>=i} p_j`, exceeds eps². So that is its score, and eps²
    the threshold of a global ranking: nothing is bisected. A matrix that is dead on the calibration tokens needs none.
    """
    tails = []
    for spec in request.linears:
        energy = request.energies[spec.name]
        tail = energy.flip(0).cumsum(0).flip(0)
        tails.append(tail / tail[0] if tail[0] > 0 else tail)
    return take_best(assemble(request.linears, tails), request)


ALLOCATOR = Allocator("tolerance", scored=False, allocate=allocate)
