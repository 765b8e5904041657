"""`curvature`: components by the loss that a Gauss-Newton model of it expects from dropping them; needs gradients."""

from __future__ import annotations

import torch

from unirank.planning.allocator.base import Allocator, Request, take_best
from unirank.planning.score import assemble


def allocate(request: Request) -> tuple[list[int], float | None]:
    """Score `sigma_i² u_iᵀ G u_i` in the basis of `whiten`, `sigma_i²` in that of `kfac` (method 4).

    Both are `(left_iᵀ G left_i)(right_i C right_iᵀ)`, which holds in the basis of any scheme. Divided by
    what the component costs, to the power `cost_power` (**choice**: 0, the plain score).
    """
    curvatures = request.kept(request.store.curvatures())
    values = []
    for spec in request.linears:
        # What lies beyond these costs nothing once they are kept.
        value = torch.cat(
            [curvatures[spec.name], torch.zeros(spec.k - len(curvatures[spec.name]), dtype=torch.float64)]
        )
        values.append(value / request.marginal(spec) ** request.options["cost_power"])
    return take_best(assemble(request.linears, values), request)


ALLOCATOR = Allocator(
    "curvature",
    scored=False,
    allocate=allocate,
    options={"cost_power": 0.0},
    gradients=True,
    ranges={"cost_power": (0.0, 2.0)},
)
