"""Decompose the linears of one layer with a scheme; failures and non-finite results carry the layer's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unirank.errors import NonFiniteError, UnirankError
from unirank.models import weight_of
from unirank.schemes import Problem, Scheme
from unirank.schemes.base import WORK_DTYPE
from unirank.types import Factors, Gradient, LayerStats, LoadedModel


@torch.no_grad()
def decompose_layer(
    loaded: LoadedModel, stats: LayerStats, scheme: Scheme, gradients: Mapping[str, Gradient] | None = None
) -> Mapping[str, Factors]:
    """Factors of every linear of layer `stats.layer`, rounded to the dtype of the model's weights.

    With `gradients` (by linear), each component also gets its curvature and its slope, whatever the scheme.

    Raises:
        UnirankError: the solver failed; names the layer.
        NonFiniteError: a factor or an energy is NaN or infinity (or does not fit the dtype); names the linear.
    """
    problems = []
    for spec in loaded.linears:
        if spec.layer == stats.layer:
            weight = weight_of(loaded.model.get_submodule(spec.name))
            moment = stats.moments[stats.input_of[spec.name]] if stats.moments else None
            gradient = gradients[spec.name] if gradients else None
            problems.append(Problem(spec.name, weight, moment, spec.max_rank, gradient))
    try:
        solved = scheme.decompose(problems)
    except (RuntimeError, ValueError) as error:
        raise UnirankError(f"The decomposition of {loaded.layers}.{stats.layer} failed: {error}") from error
    results = {}
    for problem, factors in zip(problems, solved, strict=True):
        dtype = problem.weight.dtype
        curvature, slope = _losses(problem, factors)
        result = results[problem.name] = Factors(
            factors.left.to(dtype),
            factors.right.to(dtype),
            factors.energy.to(torch.float64),
            factors.damping,
            factors.mean,
            curvature,
            slope,
        )
        for tensor in (result.left, result.right, result.energy, curvature, slope):
            if tensor is not None and not tensor.isfinite().all():
                raise NonFiniteError(f"The decomposition of {problem.name} gave NaN or infinity in {dtype}.")
    return results


def _losses(problem: Problem, factors: Factors) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What dropping component `i`, `ΔW = -left_i right_i`, does to the loss, each component by itself.

    Second order `E[(gᵀ ΔW x)²] ≈ (left_iᵀ G left_i)(right_i C right_iᵀ)`, inputs and gradients taken as independent;
    first order `<∂L/∂W, ΔW>` (arXiv 2602.02848). Both `[R]`, per token.
    """
    gradient, moment = problem.gradient, problem.moment
    if gradient is None or moment is None:
        return None, None
    left, right = factors.left.to(WORK_DTYPE), factors.right.to(WORK_DTYPE)
    curvature = ((gradient.g @ left) * left).sum(0) * ((right @ moment.c) * right).sum(1)
    slope = -((gradient.weight @ right.T) * left).sum(0)
    return curvature.clamp_min(0.0), slope
