"""Decompose the linears of one layer with a scheme; failures and non-finite results carry the layer's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unirank.errors import NonFiniteError, UnirankError
from unirank.models import weight_of
from unirank.schemes import Problem, Scheme
from unirank.types import Factors, LayerStats, LoadedModel


@torch.no_grad()
def decompose_layer(loaded: LoadedModel, stats: LayerStats, scheme: Scheme) -> Mapping[str, Factors]:
    """Factors of every linear of layer `stats.layer`, rounded to the dtype of the model's weights.

    Raises:
        UnirankError: the solver failed; names the layer.
        NonFiniteError: a factor or an energy is NaN or infinity (or does not fit the dtype); names the linear.
    """
    problems = []
    for spec in loaded.linears:
        if spec.layer == stats.layer:
            weight = weight_of(loaded.model.get_submodule(spec.name))
            moment = stats.moments[stats.input_of[spec.name]] if scheme.needs_moment else None
            problems.append(Problem(spec.name, weight, moment, spec.max_rank))
    try:
        solved = scheme.decompose(problems)
    except (RuntimeError, ValueError) as error:
        raise UnirankError(f"The decomposition of {loaded.layers}.{stats.layer} failed: {error}") from error
    results = {}
    for problem, factors in zip(problems, solved, strict=True):
        dtype = problem.weight.dtype
        results[problem.name] = Factors(
            factors.left.to(dtype), factors.right.to(dtype), factors.energy.to(torch.float64), factors.damping
        )
        for tensor in (results[problem.name].left, results[problem.name].right, factors.energy):
            if not tensor.isfinite().all():
                raise NonFiniteError(f"The decomposition of {problem.name} gave NaN or infinity in {dtype}.")
    return results
