"""`swift`: half the uniform rank a matrix, the rest by block importance and tail (Swift-SVD, arXiv 2604.01609)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from unirank.evaluation.perplexity import total_nll
from unirank.layerwise.lending import lent
from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.measure import first_windows, truncated, whole, workbench_of
from unirank.planning.allocator.targets import equivalent, ranks_from_targets, real_rank
from unirank.rank_plan import budget_of

_STAGE = "measure allocations"
_POWERS = tuple(step / 10 for step in range(11))


def allocate(request: Request) -> tuple[list[int], float | None, dict[str, Any]]:
    """Each matrix gets half its uniform rank; the pool that is left is shared in proportion to
    `BI^a * log(e + tail)^(1 - a)`, with the `a` of 0, 0.1 ... 1 whose truncated model has the least perplexity.

    **Choices**: `BI = 1 - cos` of the block, with the mean cosine. `tail` is the energy beyond the base rank, not
    divided by the matrix's energy (the logarithm is there to tame its range). The pool is shared in parameters, and a
    matrix's weight is multiplied by its `M N`, so that equal weights give uniform ranks. What a matrix cannot take
    because it is dense goes to the others. Real ranks become whole ones by `ranks_from_targets`. Perplexity is that of
    the first `windows` calibration windows; of equal ones, the smaller `a` wins.

    Returns ranks, no threshold, and `a` with the mean NLL (nats) of every candidate. Needs memory for factors beside
    the dense model.

    Raises NonFiniteError when a candidate's loss is NaN or infinity.
    """
    request.check_floor()
    workbench = workbench_of(request)
    windows = first_windows(workbench, whole(request, "windows"))
    predicted = windows.numel() - len(windows)
    candidates = {power: ranks_from_targets(request, wanted_ranks(request, power))[0] for power in _POWERS}
    losses: dict[float, float] = {}
    known: dict[tuple[int, ...], float] = {}
    with lent(workbench.loaded.model):
        for done, (power, ranks) in enumerate(candidates.items()):
            workbench.progress(_STAGE, done, len(candidates))
            if tuple(ranks) not in known:
                with truncated(request, ranks):
                    known[tuple(ranks)] = total_nll(workbench.loaded.model, windows) / predicted
            losses[power] = known[tuple(ranks)]
    workbench.progress(_STAGE, len(candidates), len(candidates))
    best = min(losses, key=lambda power: (losses[power], power))
    return candidates[best], None, {"a": best, "nll": {str(power): loss for power, loss in losses.items()}}


def wanted_ranks(request: Request, power: float) -> torch.Tensor:
    """The rule's real rank of every linear as a target of `ranks_from_targets`, float64 `[L]`, for `a = power`."""
    base, weights = [], []
    for spec in request.linears:
        half = real_rank(spec, budget_of(request.remove, spec.params), request.form) / 2
        importance = max(0.0, 1.0 - request.cosines[spec.layer]["block"].mean)
        tail = float(request.energies[spec.name][int(half) :].sum())
        base.append(equivalent(spec, half, request.form))
        weights.append(importance**power * math.log(math.e + tail) ** (1 - power) * spec.params)
    room = [spec.params - half * spec.cost for spec, half in zip(request.linears, base, strict=True)]
    pool = request.budget - sum(half * spec.cost for spec, half in zip(request.linears, base, strict=True))
    shares = _share(pool, weights, room)
    ranks = [half + share / spec.cost for spec, half, share in zip(request.linears, base, shares, strict=True)]
    return torch.tensor(ranks, dtype=torch.float64)


def _share(pool: float, weights: Sequence[float], room: Sequence[float]) -> list[float]:
    """`pool` in proportion to `weights`, none above its `room`; the excess goes to the others in proportion again."""
    shares = [0.0] * len(weights)
    open_ = [index for index, weight in enumerate(weights) if weight > 0]
    while open_:
        unit = pool / sum(weights[index] for index in open_)
        full = [index for index in open_ if weights[index] * unit >= room[index]]
        for index in full or open_:
            shares[index] = min(weights[index] * unit, room[index])
        if not full:
            break
        pool -= sum(room[index] for index in full)
        open_ = [index for index in open_ if index not in full]
    return shares


ALLOCATOR = Allocator("swift", scored=False, allocate=allocate, options={"windows": 4}, measures=True)
