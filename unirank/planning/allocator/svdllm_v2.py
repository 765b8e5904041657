"""`svdllm-v2`: a matrix loses less where its loss at the uniform rank is high (SVD-LLM V2, arXiv 2503.12340)."""

from __future__ import annotations

import math

import torch

from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.targets import break_even, groups, ranks_from_targets, shares, sizes, uniform_rank


def allocate(request: Request) -> tuple[list[int], float | None]:
    """Among the matrices of one projection type, removed fractions ∝ `1 / log(loss at the uniform rank)` (algorithm 1).

    The mean over a type is `remove`, no matrix loses more than all. The loss is the spectrum's tail beyond the uniform
    rank, summed over the calibration tokens as in the paper; it depends on how many there were. **Choices**: the
    squared error, whose log is twice that of the paper's norm (the factor cancels); `log(e + loss)`, which is positive
    for every loss and the same for a large one.
    """
    weights = []
    for spec in request.linears:
        tokens = request.cosines[spec.layer]["block"].tokens
        tail = float(request.energies[spec.name][uniform_rank(spec, request.remove, request.form) :].sum())
        weights.append(1 / math.log(math.e + tail * tokens))
    weight = torch.tensor(weights, dtype=torch.float64)
    size = sizes(request.linears)
    removed = torch.empty_like(weight)
    for members in groups([spec.kind for spec in request.linears]):
        removed[members] = shares(weight[members], size[members], request.remove)
    return ranks_from_targets(request, (1 - removed) * break_even(request.linears))


ALLOCATOR = Allocator("svdllm-v2", scored=False, allocate=allocate)
