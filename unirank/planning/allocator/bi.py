"""`bi`: ranks proportional to how far a block turns the stream (FLAT-LLM, arXiv 2505.23966)."""

from __future__ import annotations

import torch

from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.targets import break_even, ranks_from_targets
from unirank.planning.score import ScoreSettings, importance_of

_ANGULAR = ScoreSettings(importance="block", distance="angular")


def allocate(request: Request) -> tuple[list[int], float | None]:
    """Kept fractions `r / r*` ∝ `arccos(cos) / π` of the block, dense from 1 on; what that frees goes to the others.

    **Choice**: the angle of the mean token cosine, the paper's being the mean of the tokens' angles.
    """
    angles = [importance_of(request.cosines[spec.layer]["block"], _ANGULAR) for spec in request.linears]
    return ranks_from_targets(request, torch.tensor(angles, dtype=torch.float64) * break_even(request.linears))


ALLOCATOR = Allocator("bi", scored=False, allocate=allocate)
