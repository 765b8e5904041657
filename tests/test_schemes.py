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
from unirank.schemes.kfac import DAMPING
from unirank.schemes.scaled import FLOOR
from unirank.schemes.two_sided import Target, damped
from unirank.schemes.two_sided import solve as solve_targets
from unirank.truncate import lost_output
from unirank.types import CosineStat, Factors, Gradient, LayerStats, LoadedModel, Moment

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
    if name == "kfac":  # a triangular solve may round differently for another number of right-hand sides
        torch.testing.assert_close(cut.left, whole.left[:, :4], rtol=0, atol=1e-13 * float(whole.left.abs().max()))
    else:
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


# -- scaled schemes -----------------------------------------------------------------------------------------------


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


def test_unknown_scheme_is_refused_with_the_legal_names() -> None:
    with pytest.raises(
        unirank.InputError, match=re.escape(f"'magic' does not exist; legal values: {', '.join(schemes())}")
    ):
        scheme("magic")


# -- a whole layer ----------------------------------------------------------------------------------------------------


def layer_stats(loaded: LoadedModel, layer: int) -> LayerStats:
    """Statistics of white inputs."""
    eye = {spec.name: torch.eye(spec.n, dtype=torch.float64) for spec in loaded.linears if spec.layer == layer}
    white = {name: Moment(c, 0 * c[0], 9, c.sum(0)) for name, c in eye.items()}
    return LayerStats(layer, white, {name: name for name in white}, {"block": CosineStat(0.5, 0.5, 1)})


def layer_gradients(loaded: LoadedModel, layer: int) -> dict[str, Gradient]:
    """White output gradients."""
    specs = [spec for spec in loaded.linears if spec.layer == layer]
    eye = {spec: torch.eye(spec.m, dtype=torch.float64) for spec in specs}
    return {spec.name: Gradient(g, g.sum(0), g.new_ones(spec.m, spec.n)) for spec, g in eye.items()}


def random_layer(loaded: LoadedModel, layer: int) -> tuple[LayerStats, dict[str, Gradient], dict, dict]:
    """Statistics and gradients of random tokens, and the tokens `x [T, N]` and `g [T, M]` of each linear."""
    generator = torch.Generator().manual_seed(0)
    specs = [spec for spec in loaded.linears if spec.layer == layer]
    xs = {spec.name: torch.randn(20, spec.n, generator=generator, dtype=torch.float64) for spec in specs}
    gs = {spec.name: torch.randn(20, spec.m, generator=generator, dtype=torch.float64) for spec in specs}
    moments = {name: Moment(x.T @ x / 20, x.mean(0), 20, x.abs().mean(0)) for name, x in xs.items()}
    gradients = {
        name: Gradient(g.T @ g / 20, (g.T @ xs[name]).square().sum(1), g.T @ xs[name] / 20) for name, g in gs.items()
    }
    return LayerStats(layer, moments, {name: name for name in xs}, {}), gradients, xs, gs


@pytest.mark.parametrize("name", schemes())
def test_curvature_and_slope_are_what_dropping_a_component_does_to_the_loss(name: str, make_model) -> None:
    loaded = make_model("gpt2")
    loaded.model.double()
    stats, gradients, xs, gs = random_layer(loaded, 1)
    for linear, factors in decompose_layer(loaded, stats, scheme(name), gradients).items():
        assert factors.curvature.shape == factors.slope.shape == (factors.left.shape[1],)
        x, g = xs[linear] @ factors.right.T, gs[linear] @ factors.left  # [T, R]: what a component takes and gives
        pairs = (g[:, None] * x[None]).square().mean((0, 1))  # inputs and gradients of independent tokens
        torch.testing.assert_close(factors.curvature, pairs, rtol=1e-9, atol=1e-12 * float(pairs.max()))
        first_order = -(g * x).mean(0)
        torch.testing.assert_close(factors.slope, first_order, rtol=1e-9, atol=1e-12 * float(x.abs().max()))


def test_kfac_energies_are_the_curvatures_up_to_the_damping(make_model) -> None:
    loaded = make_model("gpt2")
    loaded.model.double()
    stats, gradients, _, _ = random_layer(loaded, 1)
    for linear, factors in decompose_layer(loaded, stats, scheme("kfac"), gradients).items():
        energy = factors.energy[: factors.left.shape[1]]
        share = DAMPING * gradients[linear].g.diagonal().mean() * factors.left.square().sum(0)
        torch.testing.assert_close(factors.curvature, energy * (1 - share), rtol=1e-6, atol=1e-9 * float(energy[0]))
        assert float(factors.curvature[0]) == pytest.approx(float(energy[0]), rel=0.01)


def test_without_gradients_there_is_neither_curvature_nor_slope(make_model) -> None:
    loaded = make_model("llama")
    for factors in decompose_layer(loaded, layer_stats(loaded, 1), scheme("whiten")).values():
        assert factors.curvature is None
        assert factors.slope is None


@pytest.mark.parametrize("name", schemes())
def test_layer_gives_factors_of_each_of_its_linears_up_to_break_even(name: str, make_model) -> None:
    loaded = make_model("gpt2")
    results = decompose_layer(loaded, layer_stats(loaded, 1), scheme(name), layer_gradients(loaded, 1))
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
    given = layer_stats(loaded, 0), scheme(name), layer_gradients(loaded, 0)
    decompose_layer(loaded, *given)
    loaded.model.model.layers[0].mlp.up_proj.weight.data.fill_(6e4)
    with pytest.raises(unirank.NonFiniteError, match=r"model\.layers\.0\.mlp\.up_proj .*float16"):
        decompose_layer(loaded, *given)
