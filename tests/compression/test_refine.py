"""The second pass against its own definition: every fit is optimal for what really enters the linear."""

from __future__ import annotations

import pytest
import torch

import unirank
from unirank.compression.refine import Refine, refit
from unirank.compression.replay import Inputs, Replay
from unirank.layerwise.recording import record
from unirank.layerwise.trace import traced_layer
from unirank.models.low_rank import LowRankLinear
from unirank.models.structure import weight_of
from unirank.text.windows import calibration_windows, read_text, tokenize
from unirank.types import DENSE, Gradient, LoadedModel, Rank

NAMES = ("llama", "llama-bias", "gemma3", "gpt-neox")


def windows_of(loaded: LoadedModel, calibration: unirank.Calibration) -> torch.Tensor:
    tokens = tokenize(loaded.tokenizer, read_text(calibration.text), loaded.model)
    return calibration_windows(tokens, windows=12, window=24, seed=0)


def half_ranks(loaded: LoadedModel) -> dict[str, Rank]:
    """Half of break-even, and the first linear of each layer's MLP dense."""
    ranks: dict[str, Rank] = {spec.name: max(1, spec.max_rank // 2) for spec in loaded.linears}
    for layer in range(loaded.layer_count):
        ranks[next(s.name for s in loaded.linears if s.layer == layer and s.sublayer == "mlp")] = DENSE
    return ranks


def inputs(loaded: LoadedModel, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters each linear when the whole model runs, `[T, N]`."""
    seen: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in loaded.linears}

    def hook(name: str):
        return lambda _module, args: seen[name].append(args[0].reshape(-1, args[0].shape[-1]).double())

    modules = [(spec.name, loaded.model.get_submodule(spec.name)) for spec in loaded.linears]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules]
    with torch.no_grad():
        loaded.model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_fit_is_the_best_of_its_rank_for_what_enters_it(name, mix, make_model, calibration) -> None:
    dense, own = make_model(name), make_model(name)
    windows, ranks = windows_of(dense, calibration), half_ranks(dense)
    eps = 1e-3
    refit(own, ranks, windows, Refine(mix=mix, damping=eps, shrink=0), batch=5)
    x_dense, x_own = inputs(dense, windows), inputs(own, windows)
    for spec in own.linears:
        module = own.model.get_submodule(spec.name)
        weight = weight_of(dense.model.get_submodule(spec.name)).double()
        if ranks[spec.name] == DENSE:
            assert torch.equal(weight_of(module).double(), weight)
            continue
        assert isinstance(module, LowRankLinear)
        x, y = x_dense[spec.name], x_own[spec.name]
        ridge = eps * (y.T @ y / len(y)).diagonal().mean()
        # Ridge regression as rows of data: the weight itself is the answer that the ridge pulls to.
        root = torch.eye(spec.n, dtype=torch.float64) * (ridge * len(y)).sqrt()
        stacked = torch.cat([y, root])
        wanted = torch.cat([(mix * x + (1 - mix) * y) @ weight.T, root @ weight.T])
        best = torch.linalg.lstsq(stacked, wanted).solution.T
        u = torch.linalg.svd(best @ stacked.T, full_matrices=False).U[:, : module.rank]
        torch.testing.assert_close(module.dense_weight().double(), u @ u.T @ best, rtol=1e-3, atol=1e-3)


def test_centred_fits_keep_the_mean_output(make_model, calibration) -> None:
    dense, own = make_model("llama"), make_model("llama")
    windows, ranks = windows_of(dense, calibration), half_ranks(dense)
    refit(own, ranks, windows, Refine(mix=1.0, centred=True))
    x_dense, x_own = inputs(dense, windows), inputs(own, windows)
    for spec in own.linears:
        module = own.model.get_submodule(spec.name)
        if isinstance(module, LowRankLinear):
            weight = weight_of(dense.model.get_submodule(spec.name))
            wanted = weight.double() @ x_dense[spec.name].mean(0)
            got = module(x_own[spec.name].float()).double().mean(0)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_in_an_output_metric_the_weighted_error_is_less(make_model, calibration) -> None:
    plain, metric, dense = make_model("llama"), make_model("llama"), make_model("llama")
    windows, ranks = windows_of(dense, calibration), half_ranks(dense)
    generator = torch.Generator().manual_seed(3)
    gradients = {}
    for spec in dense.linears:
        g = torch.randn(spec.m, 2 * spec.m, generator=generator, dtype=torch.float64)
        g *= torch.logspace(0, -2, spec.m, dtype=torch.float64)[:, None]
        gradients[spec.name] = Gradient(g @ g.T / g.shape[1], g[:, 0], g)
    refit(plain, ranks, windows, Refine(mix=0.0))
    refit(metric, ranks, windows, Refine(mix=0.0), gradients=lambda _layer: gradients)
    x = inputs(dense, windows)
    first = dense.linears[0]  # the only one that sees the same inputs in both

    def error(loaded: LoadedModel) -> float:
        lost = weight_of(dense.model.get_submodule(first.name)) - loaded.model.get_submodule(first.name).dense_weight()
        out = x[first.name] @ lost.double().T
        return float((out @ gradients[first.name].g * out).detach().sum())

    assert error(metric) < error(plain)


def test_nothing_to_compress_changes_no_bit(make_model, calibration) -> None:
    own, dense = make_model("llama"), make_model("llama")
    refit(own, {spec.name: DENSE for spec in own.linears}, windows_of(dense, calibration), Refine())
    for a, b in zip(own.model.state_dict().values(), dense.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_number_of_threads_does_not_change_a_bit(make_model, calibration) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            own = make_model("llama")
            refit(own, half_ranks(own), windows_of(own, calibration), Refine())
            found.append(own.model.state_dict())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("centred", [False, True])
def test_one_and_the_same_token_everywhere_still_has_a_fit(centred: bool, make_model) -> None:
    own, dense = make_model("llama"), make_model("llama")
    windows = torch.full((3, 24), 7)  # each input is one vector, so its centred moment is rounding
    refit(own, half_ranks(dense), windows, Refine(centred=centred))
    with torch.no_grad():
        found, wanted = own.model(windows[:1]).logits, dense.model(windows[:1]).logits
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("key", "value"), [("mix", 1.5), ("mix", float("nan")), ("damping", 0.0)])
def test_settings_are_refused_with_what_is_legal(key: str, value: float) -> None:
    with pytest.raises(unirank.InputError, match=key):
        Refine(**{key: value})


@pytest.mark.parametrize("room", [0, 80_000])
@pytest.mark.parametrize(("name", "dense"), [("llama", False), ("gemma3", True), ("gpt-neox", False)])
def test_less_memory_changes_no_bit(name: str, dense: bool, room: int, make_model, calibration, monkeypatch) -> None:
    """With no room every batch runs again for every input; with some, a part of the batches does."""
    whole, bounded = make_model(name), make_model(name)
    windows, ranks, settings = windows_of(whole, calibration), half_ranks(whole), Refine(dense=dense)
    refit(whole, ranks, windows, settings, batch=5)
    kept: list[int] = []
    plain = Replay._keep_to_room

    def watched(replay: Replay, position: int) -> None:
        plain(replay, position)
        kept.append(sum(given.size for batch in replay._given for given in batch.values()))

    monkeypatch.setattr(Replay, "_keep_to_room", watched)
    refit(bounded, ranks, windows, settings, batch=5, room=room)
    assert max(kept) <= room
    assert bool(max(kept)) == bool(room)
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, bounded.model.state_dict()[key]), key


def test_batches_that_are_not_kept_end_where_the_kept_ones_do(make_model, calibration) -> None:
    loaded = make_model()
    recording = record(loaded, windows_of(loaded, calibration), batch=5)
    layer, _ = traced_layer(loaded, 0, recording, recording.start.probe)
    calls = [call[0] for call in recording.calls]
    paths = list(dict.fromkeys(layer.path_of(owner) for owner in layer.trace.input_of.values()))
    found = []
    with torch.no_grad():
        for room in (None, 80_000, 0):
            stream = list(recording.start.batches)
            inputs = Inputs(layer.module, calls, stream, paths, room=room)
            ran = sum(new is not old for new, old in zip(stream, recording.start.batches, strict=True))
            assert ran == {None: 3, 80_000: 1, 0: 0}[room]
            found.append([x for path in paths for x in inputs.inputs(path)] + stream)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
