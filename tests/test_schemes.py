"""What each scheme promises about its output error, on problems small enough to check in full."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unirank
from unirank import ops
from unirank.decompose import decompose_layer
from unirank.schemes import Problem, scheme, schemes
from unirank.types import CosineStat, Factors, Gradient, LayerStats, LoadedModel, Moment

# (M, N, tokens): wide, tall, square; then moments of less than full rank, and a single row and column.
SHAPES = [(6, 9, 40), (9, 6, 40), (8, 8, 40), (7, 10, 4), (10, 7, 4), (1, 5, 9), (5, 1, 9)]


def synthetic(m: int, n: int, tokens: int, *, outlier: bool, seed: int = 0) -> tuple[Problem, torch.Tensor]:
    """A random problem of correlated inputs, and the inputs `[T, N]` (float64); an outlier channel is 1e4 larger."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5 + torch.eye(n, dtype=torch.float64))
    if outlier:
        x[:, n // 2] *= 1e4
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
    torch.testing.assert_close(factors.left @ factors.right, problem.weight.double(), rtol=0, atol=1e-11)
    assert (factors.energy >= 0).all()
    assert (factors.energy.diff() <= 0).all()
    assert factors.damping == 0


@pytest.mark.parametrize("name", schemes())
def test_factors_stop_at_the_asked_rank_and_keep_the_whole_spectrum(name: str) -> None:
    problem, _ = synthetic(9, 6, 40, outlier=False)
    whole = solve(name, problem)
    cut = solve(name, Problem("w", problem.weight, problem.moment, 4))
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


@pytest.mark.parametrize("smallest", [1e-2, 1e-7, 0.0])
def test_a_tall_weight_of_any_condition_gets_an_orthonormal_left_factor(smallest: float) -> None:
    """Well-conditioned, too badly conditioned for a Cholesky factor of WᵀW to be orthogonal, and rank-deficient."""
    problem, _ = synthetic(60, 20, 200, outlier=False)
    u, _, vh = torch.linalg.svd(problem.weight.double(), full_matrices=False)
    weight = u[:, :19] @ vh[:19] + smallest * u[:, 19:] @ vh[19:]
    factors = solve("whiten", dataclasses.replace(problem, weight=weight))
    torch.testing.assert_close(factors.left @ factors.right, weight, rtol=1e-9, atol=1e-9)
    error = factors.left.T @ factors.left - torch.eye(20, dtype=torch.float64)
    assert float(error.abs().max()) < 1e-9


def test_dead_input_gives_zero_energy_and_still_the_weight() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(6, 6, dtype=torch.float64)
    factors = solve("whiten", Problem("w", weight, Moment(zeros, zeros[0], 3), 4))
    assert factors.energy.tolist() == [0.0] * 4
    torch.testing.assert_close(factors.left @ factors.right, weight.double())


def test_unknown_scheme_is_refused_with_the_legal_names() -> None:
    with pytest.raises(
        unirank.InputError, match=re.escape(f"'magic' does not exist; legal values: {', '.join(schemes())}")
    ):
        scheme("magic")


# -- a whole layer ----------------------------------------------------------------------------------------------------


def layer_stats(loaded: LoadedModel, layer: int) -> LayerStats:
    """Statistics of white inputs."""
    names = [spec for spec in loaded.linears if spec.layer == layer]
    white = {
        s.name: Moment(torch.eye(s.n, dtype=torch.float64), torch.zeros(s.n, dtype=torch.float64), 9) for s in names
    }
    return LayerStats(layer, white, {name: name for name in white}, {"block": CosineStat(0.5, 0.5, 1)})


@pytest.mark.parametrize("name", schemes())
def test_layer_gives_factors_of_each_of_its_linears_up_to_break_even(name: str, make_model) -> None:
    loaded = make_model("gpt2")
    results = decompose_layer(loaded, layer_stats(loaded, 1), scheme(name))
    specs = [spec for spec in loaded.linears if spec.layer == 1]
    assert list(results) == [spec.name for spec in specs]
    for spec in specs:
        assert results[spec.name].left.shape == (spec.m, spec.max_rank)
        assert results[spec.name].right.shape == (spec.max_rank, spec.n)
        assert results[spec.name].left.dtype == torch.float32
        assert results[spec.name].energy.shape == (spec.k,)


@pytest.mark.parametrize(("name", "solver"), [("whiten", "batched_eigh"), ("svd", "batched_svd")])
@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_solver_failure_carries_the_layer_and_the_reason(
    name: str, solver: str, error: type[Exception], make_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make_model("llama")

    def fail(_: Sequence[torch.Tensor]) -> None:
        raise error("matrix 2 did not converge")

    monkeypatch.setattr(ops, solver, fail)
    with pytest.raises(unirank.UnirankError, match=r"model\.layers\.1 failed: matrix 2 did not converge"):
        decompose_layer(loaded, layer_stats(loaded, 1), scheme(name))


@pytest.mark.parametrize("name", schemes())
def test_factor_that_overflows_half_precision_is_an_error_that_names_the_linear(name: str, make_model) -> None:
    loaded = make_model("llama")
    loaded.model.half()
    decompose_layer(loaded, layer_stats(loaded, 0), scheme(name))
    loaded.model.model.layers[0].mlp.up_proj.weight.data.fill_(6e4)
    with pytest.raises(unirank.NonFiniteError, match=r"model\.layers\.0\.mlp\.up_proj .*float16"):
        decompose_layer(loaded, layer_stats(loaded, 0), scheme(name))
