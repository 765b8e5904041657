"""Curves measured inside of a plan: every linear a quarter below and above its own rank, in the compressed model."""

from __future__ import annotations

from collections.abc import Sequence

from unirank.planning.allocator.base import Request
from unirank.planning.allocator.curves import Curve, neighbours, refitted
from unirank.planning.allocator.probing import Probe, probed


def measured_inside(
    request: Request, probe: Probe, curves: Sequence[Curve], ranks: Sequence[int], stage: str
) -> tuple[list[Curve], dict[str, dict[str, float]]]:
    """The curves through two secants of the whole model's divergence at `ranks` (method 11).

    The model is compressed by `ranks`; then one linear at a time takes the legal rank a quarter below, and above, its
    own. See `refitted` for what becomes of the curves.

    Returns also what was measured: the change of the divergence in nats by linear, "below" and "above".
    """
    asked = [
        neighbours(curve, rank, spec.dense_rank(request.form))
        for curve, rank, spec in zip(curves, ranks, request.linears, strict=True)
    ]
    sides = {}
    for side, name in enumerate(("below", "above")):
        points = {}
        for spec, pair in zip(request.linears, asked, strict=True):
            rank = pair[side]
            if rank is not None:
                points[spec.name] = rank
        sides[name] = probed(request, probe, f"{stage}, {name}", points, ranks) if points else {}
    rises = [sides["below"].get(spec.name, 0.0) for spec in request.linears]
    drops = [-sides["above"].get(spec.name, 0.0) for spec in request.linears]
    return refitted(curves, ranks, asked, rises, drops), sides
