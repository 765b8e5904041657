"""`uniform`: the same removed fraction for every matrix (the rule of SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

import torch

from unirank.allocators.base import Allocator, Request, take_best
from unirank.score import assemble
from unirank.types import budget_of


def allocate(request: Request) -> tuple[list[int], float | None]:
    """`r = floor((1 - remove) M N / (M + N))`, at least `min_rank`, rounded down to `multiple_of`.

    Where the floor of `min_rank` would exceed the budget, the ranks are taken from a ranking by used fraction of the
    break-even rank, which lowers all matrices alike (**choice**). With remove = 0 every matrix stays dense.
    """
    if request.remove == 0:
        return [spec.k for spec in request.linears], None
    step = request.multiple_of
    floor = -(-request.min_rank // step) * step
    ranks = []
    for spec in request.linears:
        kept = budget_of(request.remove, spec.params)
        ranks.append(min(max(kept // spec.cost // step * step, floor), spec.k))
    used = sum(spec.rank_cost(rank) for spec, rank in zip(request.linears, ranks, strict=True))
    if used <= request.budget:
        return ranks, None
    fractions = [
        spec.params / (torch.arange(1, spec.k + 1, dtype=torch.float64) * spec.cost) for spec in request.linears
    ]
    return take_best(assemble(request.linears, fractions), request)[0], None


ALLOCATOR = Allocator("uniform", scored=False, allocate=allocate)
