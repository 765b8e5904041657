"""`softmax`: layer sparsity from a softmax over block influences (MoDeGPT, arXiv 2408.09632)."""

from __future__ import annotations

import math

import torch

from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.targets import break_even, ranks_from_targets, shares, sizes
from unirank.planning.score import ScoreSettings, importance_of

_BLOCK = ScoreSettings(importance="block")


def allocate(request: Request) -> tuple[list[int], float | None]:
    """Removed fraction of a layer `L remove softmax(-BI / temperature)`, `BI = 1 - cos` of the block; uniform inside.

    **Choices**: the paper's formula assumes equally large layers; here the softmax is scaled so that the mean by
    parameters is `remove`, which is the same for those. A layer cannot lose more than all; what lies beyond goes to the
    others in proportion.
    """
    influence = torch.tensor(
        [importance_of(cosines["block"], _BLOCK) for cosines in request.cosines], dtype=torch.float64
    )
    weights = torch.softmax(-influence / request.options["temperature"], 0)[[spec.layer for spec in request.linears]]
    removed = shares(weights, sizes(request.linears), request.remove)
    return ranks_from_targets(request, (1 - removed) * break_even(request.linears))


ALLOCATOR = Allocator(
    "softmax", scored=False, allocate=allocate, options={"temperature": 0.1}, ranges={"temperature": (1e-6, math.inf)}
)
