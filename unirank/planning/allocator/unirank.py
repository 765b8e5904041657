"""`unirank`: one global ranking of all components by importance times local energy ratio (arXiv 2606.21847)."""

from __future__ import annotations

from unirank.planning.allocator.base import Allocator, Request, take_best
from unirank.planning.score import score


def allocate(request: Request) -> tuple[list[int], float | None]:
    """Score, sort all components of all layers at once, keep the longest prefix within the budget (method 2)."""
    asked = request.settings, request.form, request.shares
    components = score(request.linears, request.energies, request.cosines, *asked)
    return take_best(components, request)


ALLOCATOR = Allocator("unirank", scored=True, allocate=allocate)
