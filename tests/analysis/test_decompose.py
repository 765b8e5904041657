"""A whole layer: factors of each of its linears, what dropping a component costs, and failures with names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import unirank
from unirank import ops
from unirank.analysis.decompose import decompose_layer
from unirank.analysis.scheme import scheme, schemes
from unirank.analysis.scheme.kfac import DAMPING
from unirank.types import CosineStat, Gradient, LayerStats, LoadedModel, Moment


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


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("name", schemes())
def test_layer_gives_factors_of_each_of_its_linears(name: str, full: bool, make_model) -> None:
    """Up to K, or up to break-even where a store of an older format is gone on with."""
    loaded = make_model("gpt2")
    results = decompose_layer(loaded, layer_stats(loaded, 1), scheme(name), layer_gradients(loaded, 1), full=full)
    specs = [spec for spec in loaded.linears if spec.layer == 1]
    assert list(results) == [spec.name for spec in specs]
    for spec in specs:
        rank = spec.k if full else spec.max_rank
        assert results[spec.name].left.shape == (spec.m, rank)
        assert results[spec.name].right.shape == (rank, spec.n)
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
