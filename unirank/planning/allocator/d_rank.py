"""`d-rank`: ranks by the spectrum's effective rank, then a share of q's and k's for v (D-Rank, arXiv 2509.25622)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from unirank.errors import InputError
from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.targets import break_even, groups, ranks_from_targets, role, shares, sizes
from unirank.types import LinearSpec, effective_rank


def allocate(request: Request) -> tuple[list[int], float | None]:
    """`k ∝ sqrt(R / w)` among the matrices of one projection type, `R` the effective rank, `w = M + N`.

    It minimises `Σ R / k` at a given `Σ k w`. Every type keeps `1 - remove` of its parameters, no matrix more than
    dense. Then, layer by layer, a share `beta` of what q and k keep moves to v. **Choices**: what moves is parameters,
    equal to the paper's ranks where q, k and v are equally large; and no more than v takes to be dense.
    """
    linears = request.linears
    size, limit = sizes(linears), break_even(linears)
    # The rank in units of r*: its mean over a type, weighted by size, is the kept fraction.
    density = [effective_rank(request.energies[spec.name]) / spec.cost for spec in linears]
    weights = torch.tensor(density, dtype=torch.float64).sqrt() / limit
    fractions = torch.empty(len(linears), dtype=torch.float64)
    for members in groups([spec.kind for spec in linears]):
        fractions[members] = shares(weights[members], size[members], 1 - request.remove)
    kept = fractions * size
    if request.options["beta"] > 0:
        for q, k, v in _projections(linears):
            pool, room = float(kept[q] + kept[k]), float(size[v] - kept[v])
            moved = min(request.options["beta"], room / pool)
            kept[v] += moved * pool
            kept[[q, k]] *= 1 - moved
    return ranks_from_targets(request, kept / size * limit)


def _projections(linears: Sequence[LinearSpec]) -> list[tuple[int, int, int]]:
    """Positions of q, k and v in each layer; raises InputError where they are not separate linears."""
    found: dict[int, dict[str | None, int]] = {}
    for position, spec in enumerate(linears):
        found.setdefault(spec.layer, {})[role(spec)] = position
    for layer, roles in found.items():
        if missing := {"q", "k", "v"} - roles.keys():
            raise InputError(
                f"The allocator d-rank with beta > 0 needs separate q, k and v projections; layer {layer} has no "
                f"{' and no '.join(sorted(missing))}; with beta = 0 nothing is moved."
            )
    return [(roles["q"], roles["k"], roles["v"]) for roles in found.values()]


def check(linears: Sequence[LinearSpec], options: Mapping[str, float]) -> None:
    """Raise InputError where beta > 0 and q, k and v are not separate linears."""
    if options["beta"] > 0:
        _projections(linears)


ALLOCATOR = Allocator(
    "d-rank", scored=False, allocate=allocate, options={"beta": 0.2}, ranges={"beta": (0.0, 1.0)}, check=check
)
