"""`typed`: a fixed ratio between the projection types of attention (LoRAP, arXiv 2404.09695)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from unirank.errors import InputError
from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.targets import ROLES, break_even, groups, ranks_from_targets, role, shares, sizes
from unirank.types import LinearSpec


def allocate(request: Request) -> tuple[list[int], float | None]:
    """Kept fractions `(v, o) : (q, k) = ratio : 1`, none beyond dense; the same in every layer.

    **Choices**: the ratio is that of kept fractions `r / r*`, which is the paper's ratio of parameters where the four
    are equally large, and has a meaning for grouped queries. Attention as a whole keeps `1 - remove`, and so does every
    MLP matrix (the paper prunes the MLP's channels instead). What v and o cannot take beyond dense, q and k keep.

    """
    fractions = torch.empty(len(request.linears), dtype=torch.float64)
    for members in groups([spec.sublayer for spec in request.linears]):
        linears = [request.linears[i] for i in members]
        weights = [request.options["ratio"] if role(spec) in ("v", "o") else 1.0 for spec in linears]
        fractions[members] = shares(torch.tensor(weights, dtype=torch.float64), sizes(linears), 1 - request.remove)
    return ranks_from_targets(request, fractions * break_even(request.linears))


def check(linears: Sequence[LinearSpec], _options: Mapping[str, float]) -> None:
    """Raise InputError where q, k, v and o are not separate linears, as with a fused query_key_value."""
    for spec in linears:
        if spec.sublayer == "attention" and role(spec) is None:
            raise InputError(
                f"The allocator typed needs separate q, k, v and o projections, and {spec.name} is none of them; "
                f"it knows the names {', '.join(ROLES)}."
            )


ALLOCATOR = Allocator(
    "typed",
    scored=False,
    allocate=allocate,
    options={"ratio": 3.0},
    ranges={"ratio": (0.0, math.inf)},
    check=check,
)
