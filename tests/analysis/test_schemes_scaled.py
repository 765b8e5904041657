"""Schemes that scale rows or columns before the SVD, and dead channels in them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.problems import COLUMNS, SHAPES, solve, synthetic, tails
from unirank.analysis.scheme.scaled import FLOOR
from unirank.types import Moment


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*COLUMNS, "fwsvd"])
def test_scaled_schemes_are_the_svd_of_the_scaled_weight(name: str, shape: tuple[int, int, int], outlier: bool) -> None:
    problem, x = synthetic(*shape, outlier=outlier)
    factors = solve(name, problem)
    weight = problem.weight.double()
    rows = problem.gradient.rows.sqrt()[:, None] if name == "fwsvd" else torch.ones(1, dtype=torch.float64)
    columns = COLUMNS[name](x) if name in COLUMNS else torch.ones(1, dtype=torch.float64)
    scaled = rows * weight * columns
    u, sigma, vh = torch.linalg.svd(scaled, full_matrices=False)
    rounding = 1e-12 * float(sigma[0])
    torch.testing.assert_close(factors.energy.sqrt(), sigma, rtol=0, atol=rounding)
    errors = []
    for r in range(len(sigma) + 1):
        found = rows * (factors.left[:, :r] @ factors.right[:r]) * columns
        torch.testing.assert_close(found, (u[:, :r] * sigma[:r]) @ vh[:r], rtol=0, atol=10 * rounding)
        errors.append(float((scaled - found).square().sum()))
    assert errors == pytest.approx(tails(factors.energy), abs=1e-11 * errors[0])
    assert factors.damping == 0


@pytest.mark.parametrize("name", [*COLUMNS, "fwsvd"])
def test_dead_channels_are_recorded_as_damping_and_lose_nothing(name: str) -> None:
    problem, x = synthetic(6, 9, 40, outlier=False)
    x[:, 2] = 0
    rows = problem.gradient.rows.clone()
    rows[3] = 0
    moment = Moment(x.T @ x / len(x), x.mean(0), len(x), x.abs().mean(0))
    gradient = dataclasses.replace(problem.gradient, rows=rows)
    factors = solve(name, dataclasses.replace(problem, moment=moment, gradient=gradient))
    assert factors.damping == FLOOR
    # The dead channel is scaled down by FLOOR, so on the way back its rounding comes up by 1 / FLOOR.
    torch.testing.assert_close(factors.left @ factors.right, problem.weight.double(), rtol=0, atol=1e-14 / FLOOR)
    alive = torch.ones(6, 9, dtype=torch.bool)
    if name == "fwsvd":
        alive[3] = False
    else:
        alive[:, 2] = False
    torch.testing.assert_close(
        (factors.left @ factors.right)[alive], problem.weight.double()[alive], rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("name", [*COLUMNS, "fwsvd"])
def test_scales_that_are_all_zero_give_the_plain_svd_and_are_recorded(name: str) -> None:
    problem, _ = synthetic(6, 9, 40, outlier=False)
    zeros = torch.zeros(9, 9, dtype=torch.float64)
    moment = Moment(zeros, zeros[0], 40, zeros[0])
    gradient = dataclasses.replace(problem.gradient, rows=torch.zeros(6, dtype=torch.float64))
    factors, plain = solve(name, dataclasses.replace(problem, moment=moment, gradient=gradient)), solve("svd", problem)
    assert factors.damping == FLOOR
    assert torch.equal(factors.energy, plain.energy)
    assert torch.equal(factors.left, plain.left)
    assert torch.equal(factors.right, plain.right)
