"""Healing in the metric of the loss: whose gradients they are, and what counting errors by them changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.healing import QUICK, layers, weights
from unirank.analysis.scheme.two_sided import damped
from unirank.errors import InputError, StoreError
from unirank.finetuning.output_metric import OutputMetric, linear_of_the_output
from unirank.layerwise.recording import layers_of, record
from unirank.types import LoadedModel


def _analyzed(loaded: LoadedModel, calibration: unirank.Calibration, place: Path, scheme: str = "kfac") -> Any:
    calibration = dataclasses.replace(calibration, gradient_windows=6 if scheme == "kfac" else 0)
    return unirank.analyze(loaded, place, scheme=scheme, calibration=calibration)


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("llama", {}, "mlp.down_proj"),
        ("llama-bias", {}, "mlp.down_proj"),
        ("gpt-neox", {}, "mlp.dense_4h_to_h"),
        ("gpt-neox", {"use_parallel_residual": False}, "mlp.dense_4h_to_h"),
        ("gpt2", {}, "mlp.c_proj"),
        ("opt", {}, "fc2"),
        ("gemma3", {}, None),  # a norm stands behind the last linear
    ],
)
def test_the_linear_that_is_added_to_the_stream_is_found(name, changes, found, make_model) -> None:
    loaded = make_model(name, **changes)
    seen = record(loaded, torch.arange(24).view(2, 12), batch=2)
    specs = [spec for spec in loaded.linears if spec.layer == 0]
    prefix = f"{loaded.layers}.0."
    before = {key: tensor.clone() for key, tensor in loaded.model.state_dict().items()}
    linear = linear_of_the_output(layers_of(loaded)[0], prefix, specs, seen.calls[0][0], seen.start.batches[0])
    assert linear == (None if found is None else prefix + found)
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.model.state_dict().items())
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_a_scaled_residual_is_found_too(tokenizer) -> None:
    """Granite multiplies what it adds."""
    from transformers import GraniteConfig, GraniteForCausalLM

    from tests.support.tiny import COMMON

    model = GraniteForCausalLM(GraniteConfig(**COMMON, residual_multiplier=0.22))
    loaded = unirank.describe(model, tokenizer, source="granite")
    seen = record(loaded, torch.arange(12)[None], batch=1)
    specs = [spec for spec in loaded.linears if spec.layer == 1]
    prefix = f"{loaded.layers}.1."
    linear = linear_of_the_output(layers_of(loaded)[1], prefix, specs, seen.calls[0][1], seen.start.batches[0])
    assert linear == prefix + "mlp.down_proj"


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_the_metric_is_that_of_the_gradients_at_the_layer_s_output(name, make_model, calibration, tmp_path) -> None:
    loaded = make_model(name)
    store = _analyzed(loaded, dataclasses.replace(calibration, clip=0), tmp_path / "store")
    tokens = unirank.make_workbench(loaded, store, text=calibration.text).windows
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        outputs[-1].retain_grad()

    index = 1
    handle = layers_of(loaded)[index].register_forward_hook(keep)
    logits = loaded.model(tokens).logits[:, :-1].double()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    assert outputs[0].grad is not None
    rows = outputs[0].grad.flatten(0, 1).double()
    seen = record(loaded, tokens, batch=len(tokens))
    metric = OutputMetric(store, loaded.layers, 0.1)
    root = metric.of(layers_of(loaded)[index], index, seen.calls[0][index], seen.start.batches[0])
    assert root is not None
    wanted = damped(rows.T @ rows, 0.1)
    wanted = wanted / wanted.diagonal().mean()
    torch.testing.assert_close((root @ root.T).double(), wanted, rtol=1e-3, atol=1e-4)


def test_errors_count_by_what_the_loss_feels(pair, words, calibration, tmp_path: Path) -> None:
    dense, small = pair()
    store = _analyzed(dense, calibration, tmp_path / "store")
    before = weights(small)
    plain = weights(unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "plain"))
    small.model.load_state_dict(before)
    healed = unirank.heal(small, words, QUICK, against=dense, store=tmp_path / "store", work=tmp_path / "metric")
    assert all(one["metric"] and one["after"] < one["before"] for one in layers(healed))
    assert any(not torch.equal(tensor, plain[key]) for key, tensor in weights(healed).items())
    assert healed.training is not None
    assert healed.training["gradients"] == store.digest
    card = (healed.save(tmp_path / "out") / "README.md").read_text()
    assert "mix = 0.5, in the metric of the loss, lr = " in card


def test_where_no_linear_s_gradient_is_the_layer_s_every_direction_counts_alike(
    pair, words, calibration, tmp_path: Path
) -> None:
    dense, small = pair("gemma3")
    _analyzed(dense, calibration, tmp_path / "store")
    before = weights(small)
    plain = weights(unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "plain"))
    small.model.load_state_dict(before)
    healed = unirank.heal(small, words, QUICK, against=dense, store=tmp_path / "store", work=tmp_path / "metric")
    assert not any(one["metric"] for one in layers(healed))
    assert all(torch.equal(tensor, plain[key]) for key, tensor in weights(healed).items())


def test_a_store_that_does_not_serve_is_refused_before_any_work(pair, words, calibration, tmp_path: Path) -> None:
    dense, small = pair()
    other, _ = pair("llama-bias")
    _analyzed(dense, calibration, tmp_path / "plain", scheme="whiten")
    _analyzed(other, calibration, tmp_path / "other")
    cases = [
        ("plain", StoreError, "was analyzed without gradients"),
        ("other", InputError, "was made from another model"),
        ("nowhere", StoreError, "is not an analysis store"),
    ]
    for place, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            unirank.heal(small, words, QUICK, against=dense, store=tmp_path / place, work=tmp_path / "work")
        assert not (tmp_path / "work").exists()


def test_another_metric_is_another_run(pair, words, calibration, tmp_path: Path) -> None:
    dense, small = pair()
    _analyzed(dense, calibration, tmp_path / "store")
    unirank.heal(small, words, QUICK, against=dense, store=tmp_path / "store", work=tmp_path / "work")
    _, small = pair()
    with pytest.raises(InputError, match="belongs to another healing; it differs in gradients"):
        unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "work")
