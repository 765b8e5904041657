"""`asvd`, `awsvd` and `fwsvd`: the plain SVD of a weight whose columns or rows were scaled first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from unirank.analysis.scheme.base import Problem, Scheme, svd
from unirank.types import Factors

# Where a scale is this small beside the mean one, it is raised to it: a dead channel has scale 0 (**choice**).
FLOOR = 1e-6


def floored(scale: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`scale` with entries below `FLOOR` times the mean raised to that, and the damping to record: FLOOR or 0."""
    least = FLOOR * float(scale.mean())
    if least == 0:
        return torch.ones_like(scale), FLOOR  # nothing is known: all alike
    raised = scale.clamp_min(least)
    return raised, 0.0 if torch.equal(raised, scale) else FLOOR


def columns(scale_of: Callable[[Problem], torch.Tensor]) -> Callable[[Sequence[Problem]], list[Factors]]:
    """SVD of `W diag(s)`, `s = scale_of(problem) [N]`; right times `diag(1/s)`."""

    def decompose(problems: Sequence[Problem]) -> list[Factors]:
        scales = [floored(scale_of(problem)) for problem in problems]
        weights = [p.weight.to(p.work) * s for p, (s, _) in zip(problems, scales, strict=True)]
        return [
            Factors(f.left, f.right / s, f.energy, damping)
            for f, (s, damping) in zip(svd(weights, [p.max_rank for p in problems]), scales, strict=True)
        ]

    return decompose


def rows(scale_of: Callable[[Problem], torch.Tensor]) -> Callable[[Sequence[Problem]], list[Factors]]:
    """SVD of `diag(d) W`, `d = scale_of(problem) [M]`; left by `diag(1/d)`."""

    def decompose(problems: Sequence[Problem]) -> list[Factors]:
        scales = [floored(scale_of(problem)) for problem in problems]
        weights = [p.weight.to(p.work) * d[:, None] for p, (d, _) in zip(problems, scales, strict=True)]
        return [
            Factors(f.left / d[:, None], f.right, f.energy, damping)
            for f, (d, damping) in zip(svd(weights, [p.max_rank for p in problems]), scales, strict=True)
        ]

    return decompose


def mean_abs(problem: Problem) -> torch.Tensor:
    """`s_j = (mean |x_j|)^a` with `a = 0.5` (ASVD, arXiv 2312.05821)."""
    assert problem.moment is not None
    assert problem.moment.mean_abs is not None
    return problem.moment.mean_abs.sqrt()


def root_mean_square(problem: Problem) -> torch.Tensor:
    """`s_j = sqrt(E[x_j²])`, which is `sqrt(Σ x_j²)` up to a factor that cancels."""
    assert problem.moment is not None
    return problem.moment.c.diagonal().clamp_min(0.0).sqrt()


def fisher_rows(problem: Problem) -> torch.Tensor:
    """`d_i = sqrt(Σ_j E[(∂L/∂W_ij)²])`, E over calibration windows (FWSVD, arXiv 2207.00112)."""
    assert problem.gradient is not None
    return problem.gradient.rows.sqrt()


ASVD = Scheme("asvd", needs_moment=True, decompose=columns(mean_abs), needs_mean_abs=True)
AWSVD = Scheme("awsvd", needs_moment=True, decompose=columns(root_mean_square))
FWSVD = Scheme("fwsvd", needs_moment=False, decompose=rows(fisher_rows), needs_gradient=True)
