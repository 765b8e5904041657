"""What each scheme promises about its output error, on problems small enough to check in full."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unirank
from tests.support.problems import (
    EXACT,
    SHAPES,
    biased_errors,
    cholesky_errors,
    conditioning,
    metric_errors,
    output_errors,
    scale_of,
    solve,
    synthetic,
    tails,
    total_energy,
    with_gradients,
)
from unirank.analysis.scheme import scheme, schemes, two_sided
from unirank.analysis.scheme.base import Problem
from unirank.analysis.scheme.kfac import DAMPING
from unirank.analysis.scheme.scaled import FLOOR
from unirank.analysis.scheme.two_sided import Target, damped
from unirank.analysis.scheme.two_sided import solve as solve_targets
from unirank.types import Factors, Moment


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


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["whiten", "kfac"])
@pytest.mark.parametrize("smallest", [1e-2, 1e-5, 1e-12])
def test_where_one_cholesky_factor_is_not_enough_a_second_one_is_made(
    name: str, first: bool, smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU looks `first`, and solves one eigenproblem whatever it finds; beyond 1e-8 only a Householder QR helps."""
    problem, _ = synthetic(60, 20, 200, outlier=False)
    u, _, vh = torch.linalg.svd(problem.weight.double(), full_matrices=False)
    problem = dataclasses.replace(problem, weight=u[:, :19] @ vh[:19] + smallest * u[:, 19:] @ vh[19:])
    solved, householder, plain = [], [], two_sided.eigh_descending
    monkeypatch.setattr(two_sided, "has_queues", lambda _: first)
    monkeypatch.setattr(two_sided, "eigh_descending", lambda matrices: solved.append(1) or plain(matrices))
    qr = two_sided._householder
    monkeypatch.setattr(two_sided, "_householder", lambda target: householder.append(1) or qr(target))
    factors = solve(name, problem)
    torch.testing.assert_close(factors.left @ factors.right, problem.weight, rtol=1e-9, atol=1e-9)
    g = damped(problem.gradient.g, DAMPING) if name == "kfac" else torch.eye(60, dtype=torch.float64)
    error = factors.left.T @ g @ factors.left - torch.eye(20, dtype=torch.float64)
    assert float(error.abs().max()) < 1e-12
    if smallest == 1e-5:
        assert not householder
    if first or smallest != 1e-12:  # there rounding decides whether there is a first one
        assert len(solved) == (2 if smallest == 1e-5 and not first else 1)


@pytest.mark.parametrize("name", schemes())
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_work_in_float32_is_float32_throughout_and_near_the_same(name: str, shape: tuple[int, int]) -> None:
    problem, x = synthetic(*shape, 200, outlier=False)
    moment, gradient = problem.moment, problem.gradient
    single = dataclasses.replace(
        problem,
        moment=dataclasses.replace(moment, **{k: getattr(moment, k).float() for k in ("c", "mean", "mean_abs")}),
        gradient=dataclasses.replace(gradient, **{k: getattr(gradient, k).float() for k in ("g", "rows", "weight")}),
        work=torch.float32,
    )
    double, found = solve(name, problem), solve(name, single)
    assert {found.left.dtype, found.right.dtype, found.energy.dtype} == {torch.float32}
    torch.testing.assert_close(found.energy.double(), double.energy, rtol=0, atol=1e-5 * float(double.energy[0]))
    errors, exact = (output_errors(f, problem, x) for f in (widened(found), double))
    for one, other in zip(errors, exact, strict=True):
        assert abs(one - other) < 1e-5 * total_energy(problem, x)


def widened(factors: Factors) -> Factors:
    return dataclasses.replace(factors, left=factors.left.double(), right=factors.right.double())


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
