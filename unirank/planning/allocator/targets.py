"""What the rules that rank whole matrices share: shares of the budget, and integer ranks from real-valued targets.

A matrix of rank r keeps the fraction `r / r*` of its parameters, `r* = M N / (M + N)`; at `r*` it is dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from unirank.planning.allocator.base import Request, take_best
from unirank.planning.score import assemble
from unirank.rank_plan import budget_of
from unirank.types import Form, LinearSpec

Role = Literal["q", "k", "v", "o"]

ROLES: dict[str, Role] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
}

# Beside the largest weight. A weight of 0 becomes this, so that what the others cannot take has a place to go.
_LEAST = 1e-9


def ranks_from_targets(request: Request, targets: torch.Tensor) -> tuple[list[int], None]:
    """Ranks proportional to `targets` at the exact budget: `r_l = floor(f target_l)`, dense where `f target_l >= r*`.

    The one factor f is the largest that the budget affords. Nothing is searched for it: component i of matrix l is
    bought from `f = min(i, r*) / target_l` on, so that ranking all components by the inverse gives f, the floor of
    `min_rank`, the rounding to `multiple_of` and its residual fill (`take_best`). Where the targets already fit the
    budget, f is a little above 1, for what the rounding frees.

    In the pivoted form the same shares of parameters are kept: a target is the rank that two factors of that many
    parameters have, and `i` becomes `i (M + N - i) / (M + N)`.

    Args:
        targets: float64 `[L]`, at least 0. Where one is 0, its matrix grows only when the others are dense.

    Raises InputError when `min_rank` alone exceeds the budget, NonFiniteError when a target is NaN or infinity.
    """
    scores = []
    for spec, target in zip(request.linears, _positive(targets), strict=True):
        scores.append(target / (request.prices(spec).double() / spec.cost))
    return take_best(assemble(request.linears, scores), request)[0], None


def shares(weights: torch.Tensor, sizes: torch.Tensor, mean: float) -> torch.Tensor:
    """Fractions in [0, 1] proportional to `weights`, `min(1, f w)`, whose mean weighted by `sizes` is `mean`.

    What a fraction beyond 1 would have taken goes to the others in the same proportion.

    Args:
        weights: float64 `[L]`, at least 0; where all are 0, all fractions are alike.
        sizes: `[L]`, parameters.
        mean: in [0, 1].
    """
    weights = _positive(weights)
    order = weights.argsort(descending=True, stable=True)
    w, size = weights[order], sizes[order].double()
    full = size.cumsum(0) - size  # of those before, which are at 1 if this one is
    rest = (size * w).flip(0).cumsum(0).flip(0)
    factors = ((mean * size.sum() - full) / rest).clamp_min(0.0)
    # The first factor that leaves its own fraction at most 1; rounding can miss the last, which always does.
    fits = (factors * w <= 1).nonzero().flatten()
    factor = factors[fits[0]] if len(fits) else factors[-1]
    return (factor * weights).clamp_max(1.0)


def break_even(linears: Sequence[LinearSpec]) -> torch.Tensor:
    """`r* = M N / (M + N)`, float64 `[L]`: the rank at which factors cost what the dense matrix costs."""
    return sizes(linears) / torch.tensor([spec.cost for spec in linears], dtype=torch.float64)


def sizes(linears: Sequence[LinearSpec]) -> torch.Tensor:
    """`M N`, float64 `[L]`."""
    return torch.tensor([spec.params for spec in linears], dtype=torch.float64)


def uniform_rank(spec: LinearSpec, remove: float, form: Form) -> int:
    """The largest rank that costs at most `(1 - remove) M N`: `floor((1 - remove) M N / (M + N))` for two factors.

    PIFA's rule (arXiv 2501.19090) in the pivoted form; 0 where not even rank 1 fits.
    """
    budget = budget_of(remove, spec.params)
    if form == "factors":
        return budget // spec.cost
    square = spec.cost**2 - 4 * budget  # of the quadratic r² - (M + N) r + budget, whose other root is above K
    root = math.isqrt(square)
    return (spec.cost - root - (root * root < square)) // 2


def real_rank(spec: LinearSpec, params: float, form: Form) -> float:
    """The real rank that costs `params` parameters."""
    if form == "factors":
        return params / spec.cost
    return (spec.cost - math.sqrt(spec.cost**2 - 4 * params)) / 2


def equivalent(spec: LinearSpec, rank: float, form: Form) -> float:
    """The rank of two factors with as many parameters as `rank` has: a target of `ranks_from_targets`."""
    return rank * (spec.cost - rank) / spec.cost if form == "pivoted" else rank


def groups(keys: Sequence[str]) -> list[list[int]]:
    """Positions of equal keys, in the order of their first."""
    return [[i for i, key in enumerate(keys) if key == value] for value in dict.fromkeys(keys)]


def role(spec: LinearSpec) -> Role | None:
    """What an attention linear projects to; None for one of another name (a fused query_key_value), and in the MLP.

    By the projection's own name, as in the papers: nothing in the structure tells q from k.
    """
    return ROLES.get(spec.kind.rpartition(".")[2]) if spec.sublayer == "attention" else None


def _positive(weights: torch.Tensor) -> torch.Tensor:
    """`weights` over the largest, at least `_LEAST`; all 1 where all are 0."""
    largest = weights.double().max()
    return torch.ones_like(weights, dtype=torch.float64) if largest == 0 else (weights / largest).clamp_min(_LEAST)
