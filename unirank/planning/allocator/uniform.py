"""`uniform`: the same removed fraction for every matrix (the rule of SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.targets import break_even, ranks_from_targets, uniform_rank


def allocate(request: Request) -> tuple[list[int], float | None]:
    """The largest rank that keeps at most `1 - remove`, at least `min_rank`, rounded down to `multiple_of`.

    That is `floor((1 - remove) M N / (M + N))` for two factors, and PIFA's rule (arXiv 2501.19090) in the pivoted form.

    Where the floor of `min_rank` would exceed the budget, the ranks are taken from a ranking by used fraction of the
    break-even rank, which lowers all matrices alike (**choice**). With remove = 0 every matrix stays dense.
    """
    if request.remove == 0:
        return [spec.k for spec in request.linears], None
    step = request.multiple_of
    floor = -(-request.min_rank // step) * step
    wanted = [uniform_rank(spec, request.remove, request.form) // step * step for spec in request.linears]
    ranks = [min(max(rank, floor), spec.k) for spec, rank in zip(request.linears, wanted, strict=True)]
    used = sum(spec.rank_cost(rank, request.form) for spec, rank in zip(request.linears, ranks, strict=True))
    if used <= request.budget:
        return ranks, None
    return ranks_from_targets(request, break_even(request.linears))


ALLOCATOR = Allocator("uniform", scored=False, allocate=allocate)
