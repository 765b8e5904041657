"""Curves measured inside of a plan: every linear a quarter below and above its own rank, in the compressed model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unirank.planning.allocator.base import Request
from unirank.planning.allocator.curves import Curve, measured_scales, neighbours, scaled, solved
from unirank.planning.allocator.held_out import HeldOut
from unirank.planning.allocator.measure import workbench_of
from unirank.planning.allocator.probing import Probe, probed

_POWERS = (0.0, 0.25, 0.5, 1.0)


def measured_inside(
    request: Request, probe: Probe, held: HeldOut, curves: Sequence[Curve], ranks: Sequence[int], stage: str
) -> tuple[list[Curve], dict[str, Any]]:
    """The curves scaled by two secants of the whole model's divergence at `ranks` (method 4.1).

    The model is compressed by `ranks`; then one linear at a time takes the legal rank a quarter below, and above, its
    own. The curves are multiplied by a power of `measured_scales`, the one of 0, 0.25, 0.5 and 1 whose plan has the
    least divergence on held-out windows; of equal ones the smaller (**choice**: the secants hold near `ranks`, and a
    plan by the full scales goes far from there).

    Returns also what was measured: the change of the divergence in nats by linear, "below" and "above", the power, and
    the divergence for every power.
    """
    asked = [
        neighbours(curve, rank, spec.dense_rank(request.form))
        for curve, rank, spec in zip(curves, ranks, request.linears, strict=True)
    ]
    sides: dict[str, dict[str, float]] = {}
    for side, name in enumerate(("below", "above")):
        points = {}
        for spec, pair in zip(request.linears, asked, strict=True):
            rank = pair[side]
            if rank is not None:
                points[spec.name] = rank
        sides[name] = probed(request, probe, f"{stage}, {name}", points, ranks) if points else {}
    rises = [sides["below"].get(spec.name, 0.0) for spec in request.linears]
    drops = [-sides["above"].get(spec.name, 0.0) for spec in request.linears]
    scales = measured_scales(request.linears, curves, ranks, asked, rises, drops)
    choices = [scaled(curves, (scales**power).tolist()) for power in _POWERS]
    tried = []
    for number, choice in enumerate(choices):
        workbench_of(request).progress(f"{stage}, compare", number, len(choices))
        tried.append(held.divergence(solved(request, choice)))
    workbench_of(request).progress(f"{stage}, compare", len(choices), len(choices))
    best = tried.index(min(tried))
    return choices[best], {**sides, "power": _POWERS[best], "tried": tried}
