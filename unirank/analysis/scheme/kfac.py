"""`kfac`: two-sided, by inputs and by output gradients; energies estimate the loss, so they compare across matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from unirank.analysis.scheme.base import SHRINK, Problem, Scheme
from unirank.analysis.scheme.two_sided import Target, damped, solve
from unirank.types import Factors

# Of G's mean diagonal. Directions that few calibration tokens push are known badly (**choice**, docs/experiments.md).
DAMPING = 1e-2


def decompose(problems: Sequence[Problem]) -> list[Factors]:
    """SVD of `A W S`, `AᵀA = G + eps mean(diag G) I`, `S Sᵀ = C`: left `A⁻¹ U`, right `Uᵀ A W`, energies sigma².

    `½ sigma_i²` estimates the loss increase of dropping component i, per token (Kronecker-factored Gauss-Newton,
    arXiv 1503.05671).
    """
    targets = []
    for problem in problems:
        assert problem.moment is not None
        assert problem.gradient is not None
        weight = problem.weight.to(problem.work)
        targets.append(Target(weight, problem.moment.c, damped(problem.gradient.g, DAMPING), problem.max_rank))
    return [dataclasses.replace(factors, damping=DAMPING) for factors in solve(targets)]


SCHEME = Scheme("kfac", needs_moment=True, decompose=decompose, needs_gradient=True, shrink=SHRINK)
