"""`zs-svd`: drop components so that the sum of predicted loss changes stays near zero (ZS-SVD, arXiv 2602.02848)."""

from __future__ import annotations

import heapq

import torch

from unirank.errors import NonFiniteError
from unirank.planning.allocator.base import Allocator, Request, take_best
from unirank.planning.score import assemble


def allocate(request: Request) -> tuple[list[int], float | None]:
    """First-order `ΔL_i = -sigma_i u_iᵀ(∂L/∂W S⁻ᵀ)v_i` of every component; the zero-sum order of dropping them.

    Only the last kept component of a matrix can be dropped, so that what is kept is a prefix, a rank. These candidates
    stand in two heaps by the sign of ΔL, the smallest |ΔL| on top. While the running sum of the dropped is at most 0
    the next comes from the heap of rises, else from that of falls; when one is empty, from the other.

    The order does not depend on the budget: it runs down to `min_rank`, and its reverse ranks all components
    (`take_best`), which keeps the budget, the dense rule and `multiple_of` exact. The paper drops until the target is
    met, which is the same.

    **Choices**: ΔL in the basis of the store's scheme (the paper's is `whiten`); components that
    only a dense matrix has (beyond `ceil(r*)` for two factors) count as 0; ties go to the earlier linear.
    """
    request.check_floor()
    least = -(-request.min_rank // request.multiple_of) * request.multiple_of
    slopes = request.kept(request.store.slopes())
    changes = []
    for spec in request.linears:
        if not slopes[spec.name].isfinite().all():
            raise NonFiniteError(f"The slopes of {spec.name} are NaN or infinity.")
        changes.append(slopes[spec.name].tolist())
    # What is never dropped scores above all, what only a dense matrix has below all.
    never = float(sum(len(change) for change in changes) + 1)
    scores = [torch.full((spec.k,), never, dtype=torch.float64) for spec in request.linears]
    for score, change in zip(scores, changes, strict=True):
        score[len(change) :] = 0.0
    for position, (l, i) in enumerate(zero_sum_order(changes, least)):
        scores[l][i] = position + 1.0
    return take_best(assemble(request.linears, scores), request)[0], None


def zero_sum_order(changes: list[list[float]], least: int) -> list[tuple[int, int]]:
    """`(list, index)` of the elements in the order of dropping, from the ends of `changes`, until `least` are left."""
    rises: list[tuple[float, int]] = []
    falls: list[tuple[float, int]] = []
    left = [len(change) for change in changes]

    def offer(l: int) -> None:
        if left[l] > least:
            change = changes[l][left[l] - 1]
            heapq.heappush(rises if change >= 0 else falls, (abs(change), l))

    for l in range(len(changes)):
        offer(l)
    order, total = [], 0.0
    while rises or falls:
        heap = (rises or falls) if total <= 0 else (falls or rises)
        _, l = heapq.heappop(heap)
        left[l] -= 1
        total += changes[l][left[l]]
        order.append((l, left[l]))
        offer(l)
    return order


ALLOCATOR = Allocator("zs-svd", scored=False, allocate=allocate, gradients=True)
