"""The layer-by-layer backward pass gives what autograd gives on the whole model, and survives being killed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import unirank
from tests.support.stores import contents, passing
from tests.support.tiny import WORDS, made_up_identity
from unirank.analysis.gradient_pass import gradient_pass
from unirank.analysis.store import AnalysisStore, create_or_resume
from unirank.errors import StoreError
from unirank.layerwise.backward import head_gradient
from unirank.layerwise.head import head_logits
from unirank.layerwise.lending import lent
from unirank.layerwise.recording import record
from unirank.types import Gradient, LoadedModel

# 24 tokens are three of tiny-gemma3's sliding windows; with batches of 2 the last batch is a short one.
WINDOWS = torch.randint(2, len(WORDS), (5, 24), generator=torch.Generator().manual_seed(2))
NAMES = ["llama", "llama-bias", "gemma3", "gpt-neox", "gpt2", "opt"]
LAYERS = 3


def passed(loaded: LoadedModel, path: Path, windows: torch.Tensor = WINDOWS, **options: Any) -> AnalysisStore:
    """A store that the gradient pass, and nothing else, went through."""
    store = create_or_resume(path, made_up_identity(gradient_windows=len(windows)), loaded.linears)
    gradient_pass(loaded, windows, store, batch=2, **options)
    return store


def expected(loaded: LoadedModel) -> dict[str, Gradient]:
    """The same by autograd on the whole model, a window at a time, in float64."""
    outputs: dict[str, torch.Tensor] = {}
    total: dict[str, list[torch.Tensor]] = {}
    tokens = WINDOWS.numel()

    def keep(name: str):
        def hook(_module: object, _args: object, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    modules = {spec.name: loaded.model.get_submodule(spec.name) for spec in loaded.linears}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    for ids in WINDOWS:
        loaded.model.zero_grad()
        logits = loaded.model(input_ids=ids[None], use_cache=False).logits
        F.cross_entropy(logits[0, :-1], ids[1:], reduction="sum").backward()
        for name, module in modules.items():
            g = outputs[name].grad.double().reshape(len(ids), -1)
            at_weight = module.weight.grad.double()
            if isinstance(module, Conv1D):
                at_weight = at_weight.T
            parts = (g.T @ g / tokens, at_weight.square().sum(1) / len(WINDOWS), at_weight / tokens)
            total[name] = [a + b for a, b in zip(total[name], parts, strict=True)] if name in total else list(parts)
    for handle in handles:
        handle.remove()
    loaded.model.zero_grad()
    return {name: Gradient(*parts) for name, parts in total.items()}


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_the_whole_model(name: str, make_model, tmp_path: Path) -> None:
    loaded = make_model(name)
    wanted = expected(loaded)
    with torch.no_grad():  # what a caller's context says does not matter
        store = passed(loaded, tmp_path / "store")
    for spec in loaded.linears:
        found = store.gradients(spec.layer)[spec.name]
        for key, shape in (("g", (spec.m, spec.m)), ("rows", (spec.m,)), ("weight", (spec.m, spec.n))):
            a, b = getattr(found, key), getattr(wanted[spec.name], key)
            assert a.shape == shape
            assert a.dtype == torch.float64
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), msg=f"{spec.name} {key}")
    assert passing(tmp_path / "store") == []


def test_an_analysis_runs_the_first_windows_backward(make_model, calibration, tmp_path: Path) -> None:
    loaded = make_model("llama")
    some = dataclasses.replace(calibration, gradient_windows=3)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=some)
    assert store.has_gradients
    assert store.identity.calibration.gradient_windows == 3
    text = unirank.text.windows.read_text(some.text)
    tokens = unirank.text.windows.tokenize(loaded.tokenizer, text, loaded.model)
    windows = unirank.text.windows.calibration_windows(tokens, windows=6, window=24, seed=0, bos=None, name=text.name)
    passed(loaded, tmp_path / "alone", windows[:3])
    for layer in range(LAYERS):
        name = f"gradient-{layer:04d}.safetensors"
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    for vectors in (store.curvatures(), store.slopes()):
        assert {name: len(vector) for name, vector in vectors.items()} == {s.name: s.k for s in store.linears}
        assert all(bool(vector.isfinite().all()) for vector in vectors.values())


def test_number_of_threads_does_not_change_a_byte(make_model, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            passed(make_model("llama"), tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


# -- what it leaves behind --------------------------------------------------------------------------------------------


def test_parameters_take_gradients_as_before(make_model, tmp_path: Path) -> None:
    loaded = make_model("llama")
    frozen = loaded.model.model.layers[1].mlp.up_proj.weight
    frozen.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in loaded.model.named_parameters()}
    passed(loaded, tmp_path / "store")
    assert {name: parameter.requires_grad for name, parameter in loaded.model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    frozen.data[0] = torch.nan
    with pytest.raises(unirank.NonFiniteError):
        passed(loaded, tmp_path / "other")
    assert {name: parameter.requires_grad for name, parameter in loaded.model.named_parameters()} == before
    for layer in loaded.model.model.layers:
        assert "forward" not in layer.__dict__
        assert all(not module._forward_hooks for module in layer.modules())


def test_progress_never_goes_back_and_ends_full(make_model, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    loaded = make_model("llama")
    passed(loaded, tmp_path / "store", progress=lambda *step: seen.append(step))
    assert {(stage, total) for stage, _, total in seen} == {("gradients", 2 * LAYERS)}
    assert sorted({done for _, done, _ in seen}) == list(range(2 * LAYERS + 1))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    seen.clear()
    passed(loaded, tmp_path / "store", progress=lambda *step: seen.append(step))
    assert seen == [("gradients", 2 * LAYERS, 2 * LAYERS)]


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_weight_that_turns_non_finite_is_an_error_that_names_the_layer(make_model, tmp_path: Path) -> None:
    loaded = make_model("llama")
    loaded.model.model.layers[1].self_attn.o_proj.weight.data[3] = torch.nan
    with pytest.raises(unirank.NonFiniteError, match=r"model\.layers\.1 "):
        passed(loaded, tmp_path / "store")


def test_an_infinite_loss_is_an_error_that_names_the_window(make_model, tmp_path: Path) -> None:
    loaded = make_model("llama")
    windows = WINDOWS.clone()
    windows[windows == 7] = 8
    windows[3, 5] = 7

    def never(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., 7] = -torch.inf
        return logits

    loaded.model.lm_head.register_forward_hook(never)
    with pytest.raises(unirank.NonFiniteError, match="loss of calibration window 3 "):
        passed(loaded, tmp_path / "store", windows)


def test_no_subnormal_number_goes_back_through_the_head(make_model) -> None:
    """A matrix product with them is 60 times slower; where predictions are sharp, most probabilities are such."""
    loaded = make_model("llama")
    arrived: list[torch.Tensor] = []

    def sharper(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * 400
        logits.register_hook(arrived.append)
        return logits

    loaded.model.lm_head.register_forward_hook(sharper)
    recording = record(loaded, WINDOWS, batch=1)
    hidden = 3 * torch.randn(1, WINDOWS.shape[1], loaded.model.config.hidden_size)
    with lent(loaded.model):
        found = head_gradient(loaded, recording, WINDOWS[:1], hidden, 0)
        leaf = hidden.clone().requires_grad_()
        logits = head_logits(loaded, recording, WINDOWS[:1], leaf)
        F.cross_entropy(logits[0, :-1], WINDOWS[0, 1:], reduction="sum").backward()
    ours, plain = (gradient.abs() for gradient in arrived)
    assert ((plain > 0) & (plain < 1e-38)).any()
    assert not ((ours > 0) & (ours < 1e-31)).any()
    torch.testing.assert_close(found, leaf.grad)


def test_a_gradient_that_overflows_is_an_error_that_names_the_linear(make_model, tmp_path: Path) -> None:
    loaded = make_model("llama")

    def explode(_module: object, _args: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)

    loaded.model.model.layers[1].self_attn.q_proj.register_forward_hook(explode)
    with pytest.raises(unirank.NonFiniteError, match=r"gradient at model\.layers\.1\.self_attn\.q_proj"):
        passed(loaded, tmp_path / "store")


def test_a_linear_that_no_gradient_reaches_is_an_error_that_names_it(make_model, tmp_path: Path) -> None:
    loaded = make_model("llama")
    loaded.model.model.layers[2].mlp.gate_proj.register_forward_hook(lambda *call: call[2].detach().requires_grad_())
    with pytest.raises(unirank.InputError, match=r"No gradient reaches .*layers\.2\.mlp\.gate_proj"):
        passed(loaded, tmp_path / "store")


def test_schemes_share_one_backward_pass(make_model, calibration, tmp_path: Path) -> None:
    loaded = make_model("llama-bias")
    calibration = dataclasses.replace(calibration, gradient_windows=4)
    donor = unirank.analyze(loaded, tmp_path / "kfac", scheme="kfac", calibration=calibration)
    alone = unirank.analyze(loaded, tmp_path / "alone", scheme="fwsvd", calibration=calibration)
    stages: list[tuple[str, int]] = []
    asked = dataclasses.replace(calibration, gradient_windows=None)  # as many as the donor has
    shared = unirank.analyze(
        loaded,
        tmp_path / "shared",
        scheme="fwsvd",
        calibration=asked,
        gradients_from=donor.path,
        progress=lambda stage, done, _total: stages.append((stage, done)),
    )
    assert len([stage for stage, _ in stages if stage == "gradients"]) == 1  # done at once
    assert shared.identity == alone.identity
    for file in sorted(alone.path.iterdir()):
        assert (shared.path / file.name).read_bytes() == file.read_bytes()


def test_gradients_of_another_analysis_are_refused(make_model, calibration, tmp_path: Path) -> None:
    loaded = make_model("llama")
    donor = unirank.analyze(loaded, tmp_path / "kfac", scheme="kfac", calibration=calibration)
    other = dataclasses.replace(calibration, seed=7)
    with pytest.raises(StoreError, match=r"of another analysis: calibration\.seed \(store: 0, now: 7\)"):
        unirank.analyze(loaded, tmp_path / "out", scheme="kfac", calibration=other, gradients_from=donor.path)
    plain = unirank.analyze(loaded, tmp_path / "plain", calibration=calibration)
    with pytest.raises(StoreError, match="was analyzed without gradients"):
        unirank.analyze(loaded, tmp_path / "out", scheme="kfac", calibration=calibration, gradients_from=plain.path)
    (donor.path / "gradient-0001.safetensors").unlink()
    with pytest.raises(StoreError, match="are not finished: 2 layers are missing"):
        unirank.analyze(loaded, tmp_path / "out", scheme="kfac", calibration=calibration, gradients_from=donor.path)
    assert not (tmp_path / "out").exists()


def test_a_store_without_gradients_says_how_to_make_one(make_model, calibration, tmp_path: Path) -> None:
    store = unirank.analyze(make_model("llama"), tmp_path / "store", calibration=calibration)
    assert not store.has_gradients
    for read in (store.curvatures, store.slopes, lambda: store.gradients(0)):
        with pytest.raises(unirank.StoreError, match=r"without gradients.*--gradients N"):
            read()
    with pytest.raises(unirank.InputError, match=r"curvature needs gradients.*--gradients 32"):
        unirank.plan(store, 0.3, allocator="curvature")


def test_another_number_of_gradient_windows_is_another_analysis(make_model, calibration, tmp_path: Path) -> None:
    loaded = make_model("llama")
    unirank.analyze(loaded, tmp_path / "store", calibration=dataclasses.replace(calibration, gradient_windows=2))
    for count in (None, 3):
        other = dataclasses.replace(calibration, gradient_windows=count)
        with pytest.raises(unirank.StoreError, match=rf"gradient_windows \(store: 2, now: {count or 0}\)"):
            unirank.analyze(loaded, tmp_path / "store", calibration=other)


@pytest.mark.parametrize(
    ("scheme", "count", "message"),
    [
        ("whiten", -1, r"gradient_windows = -1 .*is not legal.*at most windows = 6"),
        ("whiten", 7, r"gradient_windows = 7 .*is not legal.*at most windows = 6"),
        ("kfac", 0, r"kfac needs gradients.*at least 1"),
        ("fwsvd", 0, r"fwsvd needs gradients.*at least 1"),
    ],
)
def test_an_illegal_number_of_gradient_windows_is_refused(
    scheme: str, count: int, message: str, make_model, calibration, tmp_path: Path
) -> None:
    asked = dataclasses.replace(calibration, gradient_windows=count)
    with pytest.raises(unirank.InputError, match=message):
        unirank.analyze(make_model("llama"), tmp_path / "store", scheme=scheme, calibration=asked)
    assert not (tmp_path / "store").exists()
