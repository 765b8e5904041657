"""`uniform`: the same removed fraction for every matrix (the rule of SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.targets import break_even, ranks_from_targets, uniform_rank


def allocate(request: Request) -> tuple[list[int], float | None]:
    """`r = floor((1 - remove) M N / (M + N))`, at least `min_rank`, rounded down to `multiple_of`.

    Where the floor of `min_rank` would exceed the budget, the ranks are taken from a ranking by used fraction of the
    break-even rank, which lowers all matrices alike (**choice**). With remove = 0 every matrix stays dense.
    """
    if request.remove == 0:
        return [spec.k for spec in request.linears], None
    step = request.multiple_of
    floor = -(-request.min_rank // step) * step
    ranks = [min(max(uniform_rank(spec, request.remove) // step * step, floor), spec.k) for spec in request.linears]
    used = sum(spec.rank_cost(rank) for spec, rank in zip(request.linears, ranks, strict=True))
    if used <= request.budget:
        return ranks, None
    return ranks_from_targets(request, break_even(request.linears))


ALLOCATOR = Allocator("uniform", scored=False, allocate=allocate)
