"""Matrices to decompose, and what is measured of the factors."""

from __future__ import annotations

import dataclasses

import torch

from unirank.analysis.scheme import scheme
from unirank.analysis.scheme.base import Problem
from unirank.analysis.scheme.kfac import DAMPING
from unirank.analysis.scheme.scaled import FLOOR
from unirank.analysis.scheme.two_sided import damped
from unirank.models.low_rank import lost_output
from unirank.types import Factors, Gradient, Moment

# (M, N, tokens): wide, tall, square; then moments of less than full rank, and a single row and column.
SHAPES = [(6, 9, 40), (9, 6, 40), (8, 8, 40), (7, 10, 4), (10, 7, 4), (1, 5, 9), (5, 1, 9)]


COLUMNS = {  # schemes that scale columns, and their scales `[N]` from the inputs `[T, N]`
    "asvd": lambda x: x.abs().mean(0).sqrt(),
    "awsvd": lambda x: x.square().mean(0).sqrt(),
}


EXACT = ("svd", "whiten", "afm")  # nothing is inverted, so nothing is damped and rounding is not amplified


def synthetic(
    m: int, n: int, tokens: int, *, outlier: bool, seed: int = 0, shift: float = 0.0
) -> tuple[Problem, torch.Tensor]:
    """A random problem of correlated inputs, and the inputs `[T, N]` (float64).

    An outlier channel is 1e4 larger; `shift` is the size of the inputs' mean.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 + torch.eye(n, dtype=torch.float64))
    if outlier:
        x[:, n // 2] *= 1e4
    x += shift * torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    moment = Moment(x.T @ x / tokens, x.mean(0), tokens, x.abs().mean(0))
    g = torch.randn(tokens + m, m, generator=generator, dtype=torch.float64)
    gradient = Gradient(g.T @ g / len(g), g.square().sum(0), torch.randn(m, n, generator=generator).double())
    return Problem("w", weight, moment, min(m, n), gradient), x


def solve(name: str, problem: Problem) -> Factors:
    (factors,) = scheme(name).decompose([problem])
    return factors


def output_errors(factors: Factors, problem: Problem, x: torch.Tensor) -> list[float]:
    """Mean over tokens of `|(W - W'_r) x|²`, for r = 0 to K."""
    weight = problem.weight.double()
    return [
        float(((weight - factors.left[:, :r] @ factors.right[:r]) @ x.T).square().sum()) / len(x)
        for r in range(len(factors.energy) + 1)
    ]


def total_energy(problem: Problem, x: torch.Tensor) -> float:
    return float((problem.weight.double() @ x.T).square().sum()) / len(x)


def scale_of(name: str, problem: Problem) -> torch.Tensor:
    moment = problem.moment
    return {"asvd": moment.mean_abs, "awsvd": moment.c.diagonal(), "fwsvd": problem.gradient.rows}[name].sqrt()


def conditioning(name: str, problem: Problem) -> float:
    """How much a scheme's way there and back can amplify rounding: 1 where it only rotates.

    Else the ratio of the largest to the smallest scale, raised as the scheme does it; or the condition of `A`.
    """
    if name == "kfac":
        values = torch.linalg.eigvalsh(damped(problem.gradient.g, DAMPING))
        return float((values[-1] / values[0]).sqrt())
    if name in EXACT:
        return 1.0
    scale = scale_of(name, problem)
    return float(scale.max() / scale.clamp_min(FLOOR * float(scale.mean())).min())


def metric_errors(factors: Factors, problem: Problem, x: torch.Tensor, g: torch.Tensor) -> list[float]:
    """Mean over tokens of `|A (W - W'_r) x|²` with `AᵀA = g`, for r = 0 to K."""
    a = torch.linalg.cholesky(g).T
    weight = problem.weight.double()
    lost = [a @ (weight - factors.left[:, :r] @ factors.right[:r]) @ x.T for r in range(len(factors.energy) + 1)]
    return [float(outputs.square().sum()) / len(x) for outputs in lost]


def biased_errors(factors: Factors, problem: Problem, x: torch.Tensor) -> list[float]:
    """Mean over tokens of `|W x - W'_r x - b_r|²` with the bias of truncation, for r = 0 to K."""
    weight = problem.weight.double()
    errors = []
    for r in range(len(factors.energy) + 1):
        left, right = factors.left[:, :r], factors.right[:r]
        bias = lost_output(weight, left, right, factors.mean)
        errors.append(float((x @ (weight - left @ right).T - bias).square().sum()) / len(x))
    return errors


def tails(energy: torch.Tensor) -> list[float]:
    return [float(energy[r:].sum()) for r in range(len(energy) + 1)]


def cholesky_errors(problem: Problem, x: torch.Tensor) -> list[float]:
    """Output errors of SVD-LLM as published: `S = chol(C)`, SVD of `W S`, `W'_r = U_r S_r V_rᵀ S⁻¹`."""
    weight = problem.weight.double()
    s = torch.linalg.cholesky(x.T @ x / len(x))
    u, sigma, vh = torch.linalg.svd(weight @ s, full_matrices=False)
    right = torch.linalg.solve_triangular(s, vh, upper=False, left=False)
    return output_errors(Factors(u * sigma, right, sigma, 0.0), problem, x)


def with_gradients(problem: Problem, rank: int) -> Problem:
    """The same with output gradients that span `rank` directions."""
    m = problem.weight.shape[0]
    g = torch.randn(rank, m, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return dataclasses.replace(problem, gradient=dataclasses.replace(problem.gradient, g=g.T @ g / rank))
