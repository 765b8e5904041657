"""What each scheme promises about its output error, on problems small enough to check in full."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unirank
from unirank.schemes import Problem, scheme, schemes
from unirank.schemes.kfac import DAMPING
from unirank.schemes.scaled import FLOOR
from unirank.schemes.two_sided import Target, damped
from unirank.schemes.two_sided import solve as solve_targets
from unirank.truncate import lost_output
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


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_whiten_tail_energy_is_the_output_error(shape: tuple[int, int, int], outlier: bool) -> None:
    problem, x = synthetic(*shape, outlier=outlier)
    factors = solve("whiten", problem)
    assert output_errors(factors, problem, x) == pytest.approx(
        tails(factors.energy), abs=1e-12 * total_energy(problem, x)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_tail_energy_is_the_weight_error(shape: tuple[int, int, int]) -> None:
    problem, _ = synthetic(*shape, outlier=False)
    n = shape[1]
    units = torch.eye(n, dtype=torch.float64) * n**0.5  # tokens whose second moment is the identity
    factors = solve("svd", problem)
    expected = tails(factors.energy)
    assert output_errors(factors, problem, units) == pytest.approx(expected, abs=1e-12 * expected[0])


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] >= shape[1]])
def test_whiten_has_the_output_error_of_cholesky_whitening(shape: tuple[int, int, int], outlier: bool) -> None:
    problem, x = synthetic(*shape, outlier=outlier)
    found = output_errors(solve("whiten", problem), problem, x)
    assert found == pytest.approx(cholesky_errors(problem, x), rel=1e-6, abs=1e-12 * total_energy(problem, x))


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_whiten_reaches_the_least_possible_output_error(shape: tuple[int, int, int], outlier: bool) -> None:
    problem, x = synthetic(*shape, outlier=outlier)
    outputs = problem.weight.double() @ x.T / len(x) ** 0.5
    best = torch.zeros(min(shape[:2]), dtype=torch.float64)
    sigma = torch.linalg.svdvals(outputs)[: len(best)]
    best[: len(sigma)] = sigma.square()  # Eckart-Young: the tail of the outputs' singular values
    found = output_errors(solve("whiten", problem), problem, x)
    assert found == pytest.approx(tails(best), abs=1e-12 * total_energy(problem, x))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), tokens=st.integers(1, 20), outlier=st.booleans(), seed=st.integers(0)
)
def test_whiten_is_never_worse_than_svd(m: int, n: int, tokens: int, outlier: bool, seed: int) -> None:
    problem, x = synthetic(m, n, tokens, outlier=outlier, seed=seed % 2**32)
    rounding = 1e-12 * total_energy(problem, x)
    ours, plain = (output_errors(solve(name, problem), problem, x) for name in ("whiten", "svd"))
    assert all(a <= b + rounding for a, b in zip(ours, plain, strict=True))


def test_whiten_beats_svd_clearly_where_inputs_are_uneven() -> None:
    problem, x = synthetic(8, 8, 40, outlier=True)
    assert (
        output_errors(solve("whiten", problem), problem, x)[1]
        < 0.01 * output_errors(solve("svd", problem), problem, x)[1]
    )


@pytest.mark.parametrize("name", schemes())
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    m=st.integers(1, 12), n=st.integers(1, 12), tokens=st.integers(1, 20), outlier=st.booleans(), seed=st.integers(0)
)
def test_full_rank_reproduces_the_weight_and_spectra_descend_from_it(
    name: str, m: int, n: int, tokens: int, outlier: bool, seed: int
) -> None:
    problem, _ = synthetic(m, n, tokens, outlier=outlier, seed=seed % 2**32)
    factors = solve(name, problem)
    k = min(m, n)
    assert factors.left.shape == (m, k)
    assert factors.right.shape == (k, n)
    assert factors.energy.shape == (k,)
    atol = 1e-11 * conditioning(name, problem)
    torch.testing.assert_close(factors.left @ factors.right, problem.weight.double(), rtol=0, atol=atol)
    assert (factors.energy >= 0).all()
    assert (factors.energy.diff() <= 0).all()
    if name in EXACT:
        assert factors.damping == 0
    elif name == "kfac":
        assert factors.damping == DAMPING
    else:
        scale = scale_of(name, problem)
        assert factors.damping == (FLOOR if float(scale.min()) < FLOOR * float(scale.mean()) else 0)
    assert (factors.mean is not None) == (name == "afm")


@pytest.mark.parametrize("name", schemes())
def test_factors_stop_at_the_asked_rank_and_keep_the_whole_spectrum(name: str) -> None:
    problem, _ = synthetic(9, 6, 40, outlier=False)
    whole = solve(name, problem)
    cut = solve(name, dataclasses.replace(problem, max_rank=4))
    # A product or a triangular solve may round differently for another number of rows: MKL does on AVX-512.
    near = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(cut.left / whole.left.abs().max(), whole.left[:, :4] / whole.left.abs().max(), **near)
    torch.testing.assert_close(cut.right / whole.right.abs().max(), whole.right[:4] / whole.right.abs().max(), **near)
    if name not in ("whiten", "afm", "kfac"):  # nothing is multiplied after the SVD
        assert torch.equal(cut.left, whole.left[:, :4])
        assert torch.equal(cut.right, whole.right[:4])
    assert torch.equal(cut.energy, whole.energy)


@pytest.mark.parametrize("name", schemes())
def test_a_problem_is_solved_the_same_alone_and_among_others(name: str) -> None:
    problems = [
        synthetic(*shape, outlier=False, seed=i)[0] for i, shape in enumerate([*SHAPES, (6, 9, 40), (9, 6, 40)])
    ]
    for problem, factors in zip(problems, scheme(name).decompose(problems), strict=True):
        alone = solve(name, problem)
        assert torch.equal(factors.left, alone.left)
        assert torch.equal(factors.right, alone.right)
        assert torch.equal(factors.energy, alone.energy)


@pytest.mark.parametrize("name", ["whiten", "kfac"])
@pytest.mark.parametrize("smallest", [1e-2, 1e-7, 0.0])
def test_a_tall_weight_of_any_condition_gets_an_orthonormal_left_factor(name: str, smallest: float) -> None:
    """Well-conditioned, too badly conditioned for a Cholesky factor of WᵀW to be orthogonal, and rank-deficient."""
    problem, _ = synthetic(60, 20, 200, outlier=False)
    u, _, vh = torch.linalg.svd(problem.weight.double(), full_matrices=False)
    weight = u[:, :19] @ vh[:19] + smallest * u[:, 19:] @ vh[19:]
    factors = solve(name, dataclasses.replace(problem, weight=weight))
    torch.testing.assert_close(factors.left @ factors.right, weight, rtol=1e-9, atol=1e-9)
    g = damped(problem.gradient.g, DAMPING) if name == "kfac" else torch.eye(60, dtype=torch.float64)
    error = factors.left.T @ g @ factors.left - torch.eye(20, dtype=torch.float64)
    assert float(error.abs().max()) < 1e-9


def test_dead_input_gives_zero_energy_and_still_the_weight() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(6, 6, dtype=torch.float64)
    factors = solve("whiten", Problem("w", weight, Moment(zeros, zeros[0], 3), 4))
    assert factors.energy.tolist() == [0.0] * 4
    torch.testing.assert_close(factors.left @ factors.right, weight.double())


# -- afm ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    tokens=st.integers(1, 20),
    outlier=st.booleans(),
    seed=st.integers(0, 2**32 - 2),
    shift=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_afm_with_its_bias_is_never_worse_than_whiten_and_whiten_than_svd(
    m: int, n: int, tokens: int, outlier: bool, seed: int, shift: float
) -> None:
    problem, x = synthetic(m, n, tokens, outlier=outlier, seed=seed, shift=shift)
    rounding = 1e-12 * total_energy(problem, x)
    afm = biased_errors(solve("afm", problem), problem, x)
    whiten, svd = (output_errors(solve(name, problem), problem, x) for name in ("whiten", "svd"))
    assert all(a <= b + rounding for a, b in zip(afm, whiten, strict=True))
    assert all(a <= b + rounding for a, b in zip(whiten, svd, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_afm_tail_energy_is_the_output_error_with_its_bias(shape: tuple[int, int, int]) -> None:
    problem, x = synthetic(*shape, outlier=False, shift=3.0)
    factors = solve("afm", problem)
    found = biased_errors(factors, problem, x)
    assert found == pytest.approx(tails(factors.energy), abs=1e-12 * total_energy(problem, x))
    if shape[2] > 10 and min(shape[:2]) > 1:  # enough tokens and ranks for the mean to be one direction of many
        assert found[1] < 0.9 * output_errors(solve("whiten", problem), problem, x)[1]


# -- kfac ---------------------------------------------------------------------------------------------------------


def with_gradients(problem: Problem, rank: int) -> Problem:
    """The same with output gradients that span `rank` directions."""
    m = problem.weight.shape[0]
    g = torch.randn(rank, m, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return dataclasses.replace(problem, gradient=dataclasses.replace(problem.gradient, g=g.T @ g / rank))


@pytest.mark.parametrize("rank", [1, 40])
@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_kfac_tail_energy_is_the_least_possible_error_in_the_damped_metric(
    shape: tuple[int, int, int], outlier: bool, rank: int
) -> None:
    problem, x = synthetic(*shape, outlier=outlier)
    problem = with_gradients(problem, rank)
    factors = solve("kfac", problem)
    g = damped(problem.gradient.g, DAMPING)
    found = metric_errors(factors, problem, x, g)
    # The metric's condition amplifies the rounding of W' before the metric weighs it.
    rounding = 1e-13 * conditioning("kfac", problem) * found[0]
    assert found == pytest.approx(tails(factors.energy), abs=rounding)
    best = torch.zeros(min(shape[:2]), dtype=torch.float64)
    outputs = torch.linalg.cholesky(g).T @ problem.weight.double() @ x.T / len(x) ** 0.5
    sigma = torch.linalg.svdvals(outputs)[: len(best)]
    best[: len(sigma)] = sigma.square()
    assert found == pytest.approx(tails(best), abs=rounding)  # Eckart-Young
    blind = metric_errors(solve("whiten", problem), problem, x, g)
    assert all(a <= b + rounding for a, b in zip(found, blind, strict=True))


def test_kfac_beats_whiten_clearly_where_gradients_are_uneven() -> None:
    problem, x = synthetic(8, 8, 40, outlier=False)
    problem = with_gradients(problem, 1)
    g = damped(problem.gradient.g, 1e-6)  # what matters: next to nothing of the scheme's own damping
    ours, blind = (metric_errors(solve(name, problem), problem, x, g)[1] for name in ("kfac", "whiten"))
    assert ours < 0.01 * blind


@pytest.mark.parametrize("shape", SHAPES)
def test_kfac_left_factor_is_orthonormal_in_the_damped_metric(shape: tuple[int, int, int]) -> None:
    problem, _ = synthetic(*shape, outlier=True)
    problem = with_gradients(problem, 2)
    left = solve("kfac", problem).left
    gram = left.T @ damped(problem.gradient.g, DAMPING) @ left
    torch.testing.assert_close(gram, torch.eye(left.shape[1], dtype=torch.float64), rtol=0, atol=1e-9)


def test_kfac_without_any_gradient_is_whiten() -> None:
    problem, _ = synthetic(6, 9, 40, outlier=False)
    dead = dataclasses.replace(problem.gradient, g=torch.zeros(6, 6, dtype=torch.float64))
    found, expected = solve("kfac", dataclasses.replace(problem, gradient=dead)), solve("whiten", problem)
    torch.testing.assert_close(found.energy, expected.energy)
    torch.testing.assert_close(found.left @ found.right, expected.left @ expected.right)
    assert found.damping == DAMPING


def test_a_metric_that_is_not_positive_definite_is_an_error() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    for m in (4, 6):
        target = Target(torch.ones(6, m, dtype=torch.float64), eye[:m, :m], -eye, m)
        with pytest.raises(torch.linalg.LinAlgError):
            solve_targets([target])


def test_unknown_scheme_is_refused_with_the_legal_names() -> None:
    with pytest.raises(
        unirank.InputError, match=re.escape(f"'magic' does not exist; legal values: {', '.join(schemes())}")
    ):
        scheme("magic")
