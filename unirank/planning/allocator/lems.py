"""`lems`: a table of errors over ranks from measured divergences of the model, as a knapsack (LEMS, ICML 2026)."""

from __future__ import annotations

import dataclasses
from typing import Any

from unirank.errors import InputError
from unirank.layerwise.lending import lent
from unirank.planning.allocator.base import Allocator, Request
from unirank.planning.allocator.curves import curves_through, measured_rank, solved
from unirank.planning.allocator.depth import with_depth
from unirank.planning.allocator.held_out import HeldOut, held_out_of
from unirank.planning.allocator.inside import measured_inside
from unirank.planning.allocator.measure import whole, workbench_of
from unirank.planning.allocator.probing import probe_of, probed
from unirank.planning.allocator.swaps import swapped


def allocate(request: Request) -> tuple[list[int], float | None, dict[str, Any]]:
    """`error_l(r) = KL_l * tail_l(r) / tail_l(r0)`, `tail_l(r) = Σ_{i>r} sigma_i² / Σ_j sigma_j²`; dense has error 0.

    `KL_l = KL(dense || model with l alone at rank r0)` of `softmax(logits / temperature)`, mean over `tokens` tokens
    behind the first `first` of each of `windows` calibration windows; `r0 = floor(fraction * r*)`, at least 1. It does
    not depend on the budget, so the store keeps it and the next plan is immediate. Least total error within the budget,
    over the ranks that `min_rank` and `multiple_of` allow and the dense matrix.

    Then, where the options ask for it (method 4.1):

    * `depth`: errors times a factor of their block, the best of so many (`depth_factors`, `with_depth`);
    * `rounds`: so many times, each linear is measured again inside of the plan, on the first `round_windows` of the
      windows (`measured_inside`);
    * `swaps`: so many swaps of parameters between matrices (`swapped`), by `seed`.

    They compare divergences of the whole compressed model on `held_out` further windows.

    **Choices**: the normalisation, which puts the curve through the measured point. `r0` is lowered to the last rank
    whose tail exceeds 1e-12: a matrix of lower rank than `r0` would have nothing to measure; where even rank 1 leaves
    none, the error is 0 at every rank. The knapsack is solved greedily on convex hulls (see `knapsack`).

    Returns ranks, no threshold, and what was measured: `kl` of every linear, and what the parts above say. Raises like
    `divergences`, and InputError for options that are not legal, before anything is measured.
    """
    fraction = request.options["fraction"]
    if not 0 < fraction < 1:
        raise InputError(f"The option fraction = {fraction} is not legal; it must lie between 0 and 1.")
    rounds, depth, swaps, seed = (whole(request, name, least=0) for name in ("rounds", "depth", "swaps", "seed"))
    request.check_floor()
    probe = probe_of(request)
    inside = dataclasses.replace(probe, windows=probe.windows[: whole(request, "round_windows")])
    further = held_out_of(request, probe) if depth or rounds or swaps else None
    points = {spec.name: measured_rank(spec, request.energies[spec.name], fraction) for spec in request.linears}
    divergence = probed(request, probe, "measure each linear", points)
    learned: dict[str, Any] = {"kl": divergence}
    curves = curves_through(request, points, divergence)
    if further is None:
        return solved(request, curves), None, learned
    held = HeldOut(request, further)
    with lent(workbench_of(request).loaded.model):
        if depth:
            curves, found = with_depth(request, curves, held, depth)
            learned |= found
        ranks = solved(request, curves)
        for number in range(1, rounds + 1):
            stage = f"measure in plan {number}"
            curves, learned[f"inside_{number}"] = measured_inside(request, inside, held, curves, ranks, stage)
            ranks = solved(request, curves)
        if swaps:
            ranks, found = swapped(request, curves, ranks, held, swaps, seed=seed)
            learned |= found
    return ranks, None, learned


ALLOCATOR = Allocator(
    "lems",
    scored=False,
    allocate=allocate,
    options={
        "windows": 2,
        "tokens": 256,
        "fraction": 0.1,
        "temperature": 1.0,
        "first": 0,
        "precision": 0.0,
        "rounds": 0,
        "round_windows": 1,
        "depth": 0,
        "swaps": 0,
        "held_out": 4,
        "seed": 0,
    },
    measures=True,
)
