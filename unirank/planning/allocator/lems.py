"""`lems`: a table of errors over ranks from one divergence measured a matrix, as a knapsack (LEMS, ICML 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError
from unirank.layerwise.lending import lent
from unirank.planning.allocator.base import Allocator, Request, Workbench
from unirank.planning.allocator.knapsack import knapsack
from unirank.planning.allocator.measure import divergences, first_windows, low_rank_of, whole, workbench_of
from unirank.types import LinearSpec

_STAGE = "measure each linear"
_ROUNDING = 1e-12  # relative tails below this are rounding, to which nothing can be normalised


def allocate(request: Request) -> tuple[list[int], float | None, dict[str, Any]]:
    """`error_l(r) = KL_l * tail_l(r) / tail_l(r0)`, `tail_l(r) = Σ_{i>r} sigma_i² / Σ_j sigma_j²`; dense has error 0.

    `KL_l = KL(dense || model with l alone at rank r0)`, mean over the tokens of `windows` calibration windows cut to
    `tokens`; `r0 = floor(fraction * r*)`, at least 1. It does not depend on the budget, so the store keeps it and the
    next plan is immediate. Least total error within the budget, over the ranks that
    `min_rank` and `multiple_of` allow and the dense matrix.

    **Choices**: the normalisation, which puts the curve through the measured point. `r0` is lowered to the last rank
    whose tail exceeds 1e-12: a matrix of lower rank than `r0` would have nothing to measure; where even rank 1 leaves
    none, the error is 0 at every rank. The knapsack is solved greedily on convex hulls (see `knapsack`).

    Returns ranks, no threshold, and the divergence of every linear. Raises like `divergences`.
    """
    fraction = request.options["fraction"]
    if not 0 < fraction < 1:
        raise InputError(f"The option fraction = {fraction} is not legal; it must lie between 0 and 1.")
    request.check_floor()
    points = {spec.name: measured_rank(spec, request.energies[spec.name], fraction) for spec in request.linears}
    divergence = _measure(request, points)
    options = [_options(spec, request) for spec in request.linears]
    costs = [
        torch.tensor([spec.rank_cost(rank, request.form) for rank in ranks])
        for spec, ranks in zip(request.linears, options, strict=True)
    ]
    errors = []
    for spec, ranks in zip(request.linears, options, strict=True):
        tail = relative_tail(request.energies[spec.name])
        at_point = float(tail[points[spec.name]])
        scale = divergence[spec.name] / at_point if at_point > _ROUNDING else 0.0
        error = scale * tail[torch.tensor(ranks)]
        error[-1] = 0.0  # dense
        errors.append(error)
    taken = knapsack(costs, errors, request.budget)
    return [ranks[index] for ranks, index in zip(options, taken, strict=True)], None, {"kl": divergence}


def relative_tail(energy: torch.Tensor) -> torch.Tensor:
    """Share of the energy beyond each rank 0 ... K: float64 `[K + 1]`; zeros for a matrix without energy."""
    beyond = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    return beyond / beyond[0] if beyond[0] > 0 else beyond


def measured_rank(spec: LinearSpec, energy: torch.Tensor, fraction: float) -> int:
    """`r0`: the rank at which a linear is measured."""
    rank = max(1, int(fraction * spec.params / spec.cost))
    visible = int((relative_tail(energy) > _ROUNDING).sum()) - 1
    return max(1, min(rank, visible))


def _measure(request: Request, points: Mapping[str, int]) -> dict[str, float]:
    """KL of each linear alone at its point, mean over all tokens; from the store where it was measured before."""
    workbench = workbench_of(request)
    windows = first_windows(workbench, whole(request, "windows"), whole(request, "tokens", least=2))
    settings = {"windows_sha256": sha256_tensors([("windows", windows)]), "ranks": dict(points)}
    return request.store.measured("lems", settings, lambda: _run(request, workbench, windows, points))


def _run(request: Request, workbench: Workbench, windows: torch.Tensor, points: Mapping[str, int]) -> dict[str, float]:
    loaded = workbench.loaded
    total = dict.fromkeys(points, 0.0)
    done, steps = 0, len(windows) * len(points)
    workbench.progress(_STAGE, done, steps)

    def compressed(spec: LinearSpec) -> torch.nn.Module:
        return low_rank_of(request.store, spec, loaded.model.get_submodule(spec.name), points[spec.name])

    def measured(_spec: LinearSpec) -> None:
        nonlocal done
        done += 1
        workbench.progress(_STAGE, done, steps)

    with lent(loaded.model):
        for ids in windows:
            for name, value in divergences(loaded, ids, compressed, measured).items():
                total[name] += value / len(windows)
    return total


def _options(spec: LinearSpec, request: Request) -> list[int]:
    """The legal ranks that cost less than the dense matrix, ascending, and K for dense."""
    step = request.multiple_of
    least = -(-request.min_rank // step) * step
    return [*range(least, spec.dense_rank(request.form), step), spec.k]


ALLOCATOR = Allocator(
    "lems", scored=False, allocate=allocate, options={"windows": 2, "tokens": 256, "fraction": 0.1}, measures=True
)
