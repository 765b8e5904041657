"""`tied`: as `unirank`, with one rank for all experts of a stack; to see what ranks of their own are worth."""

from __future__ import annotations

import torch

from unirank.planning.allocator.base import Allocator, Request, take_best
from unirank.planning.score import assemble, score
from unirank.types import ExpertSpec


def allocate(request: Request) -> tuple[list[int], float | None]:
    """Each component of an expert's matrix has the mean score of that component over the experts of its stack.

    Where the budget ends within a stack, its experts keep the rank of the least of them (**choice**): so a part of a
    component's cost a stack is left. Linears that are no experts are ranked as in `unirank`.
    """
    asked = request.settings, request.form, request.shares
    scores = score(request.linears, request.energies, request.cosines, *asked)
    values = [
        scores.value[first:last]
        for first, last in zip(scores.offsets.tolist(), scores.offsets[1:].tolist(), strict=False)
    ]
    stacks: dict[str, list[int]] = {}
    for position, spec in enumerate(request.linears):
        if isinstance(spec, ExpertSpec):
            stacks.setdefault(f"{spec.module}.{spec.parameter}", []).append(position)
    for members in stacks.values():
        mean = torch.stack([values[position] for position in members]).mean(0)
        for position in members:
            values[position] = mean
    ranks, threshold = take_best(assemble(request.linears, values), request)
    for members in stacks.values():
        least = min(ranks[position] for position in members)
        for position in members:
            ranks[position] = least
    return ranks, threshold


ALLOCATOR = Allocator("tied", scored=True, allocate=allocate)
