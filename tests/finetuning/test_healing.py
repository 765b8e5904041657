"""Healing lowers the error of every layer, keeps ranks, and trains what it should."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.healing import QUICK, layers, stream_error, weights
from tests.support.tiny import WORDS
from unirank.finetuning.block import Block, _rate
from unirank.finetuning.healing_text import draw
from unirank.models.low_rank import LowRankLinear, count_parameters

FAMILIES = ("llama", "llama-bias", "gemma3", "gpt-neox", "gpt2", "opt")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_error_falls_on_held_out_windows(name: str, pair, words, tmp_path: Path) -> None:
    dense, small = pair(name)
    words = dataclasses.replace(words, windows=40)
    held_out = draw(dense, words, None, QUICK.held_out).looks[0]
    shapes = {key: tensor.shape for key, tensor in weights(small).items()}
    before, count = stream_error(dense, small, held_out), count_parameters(small.model)
    untouched = {key: tensor.clone() for key, tensor in dense.model.state_dict().items()}
    settings = unirank.Heal(mix=1.0, lr=3e-3, batch=4)
    healed = unirank.heal(small, words, settings, against=dense, work=tmp_path)
    assert all(one["after"] <= one["before"] for one in layers(healed))
    # With mix 1 the last layer's error is that of the whole stream, measured here without any of our streams.
    after = stream_error(dense, healed, held_out)
    assert after == pytest.approx(layers(healed)[-1]["after"], rel=1e-4)
    assert after < 0.97 * before
    assert {key: tensor.shape for key, tensor in weights(healed).items()} == shapes
    assert count_parameters(healed.model) == count
    assert healed.plan == small.plan
    assert all(torch.equal(tensor, untouched[key]) for key, tensor in dense.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in healed.model.parameters())


def test_pivoted_factors_are_healed_and_their_pivots_stay(pair, words, tmp_path: Path) -> None:
    dense, small = pair(form="pivoted")
    before = weights(small)
    healed = unirank.heal(small, words, QUICK, against=dense, work=tmp_path)
    assert all(one["best"] > 0 for one in layers(healed))
    buffers = {name for name, _ in healed.model.named_buffers()} & before.keys()
    assert any(name.endswith(".place") for name in buffers)
    assert all(torch.equal(weights(healed)[name], before[name]) for name in buffers)


def test_all_of_a_layer_is_trained_and_nothing_else(pair, words, tmp_path: Path) -> None:
    dense, small = pair("llama-bias")
    before = weights(small)
    healed = unirank.heal(small, words, QUICK, against=dense, work=tmp_path)
    assert all(one["best"] > 0 for one in layers(healed))
    inside = {name for name, _ in healed.model.named_parameters() if name.startswith(dense.layers)}
    assert any("layernorm" in name for name in inside)
    assert {name for name, tensor in weights(healed).items() if not torch.equal(tensor, before[name])} == inside


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_aim_is_the_formula(mix: float, pair, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`||m L(x) + (1 - m) L(x') - L'(x')||² / ||L(x)||²`, with streams that are caught in whole runs of both models."""
    dense, small = pair()
    unhealed = unirank.Heal(mix=mix, lr=1e-30)  # so small that no state is better
    found = layers(unirank.heal(small, words, unhealed, against=dense, work=tmp_path))
    windows = draw(dense, words, None, unhealed.held_out).looks[0]
    blocks = [list(model.get_submodule(dense.layers).children()) for model in (dense.model, small.model)]
    inputs: list[list[torch.Tensor]] = [[], []]
    calls: list[tuple[Any, Any]] = []
    for side, model in enumerate((dense.model, small.model)):
        handles = []
        for block in blocks[side]:

            def catch(_module: Any, args: Any, kwargs: Any, _side: int = side) -> None:
                inputs[_side].append(args[0])
                calls.append((args[1:], kwargs))

            handles.append(block.register_forward_pre_hook(catch, with_kwargs=True))
        with torch.no_grad():
            model(input_ids=windows, use_cache=False)
        for handle in handles:
            handle.remove()
    for index, (theirs, ours) in enumerate(zip(*blocks, strict=True)):
        x, own = inputs[0][index], inputs[1][index]
        args, kwargs = calls[index]
        with torch.no_grad():
            wanted = theirs(x, *args, **kwargs).double()
            aim = mix * wanted + (1 - mix) * theirs(own, *args, **kwargs).double()
            lost = aim - ours(own, *args, **kwargs).double()
        error = (lost.square().sum(-1) / wanted.square().sum(-1)).mean()
        assert found[index]["before"] == pytest.approx(float(error), rel=1e-4)


def test_early_stop_keeps_the_layer_as_it_was_when_nothing_is_better(pair, words, tmp_path: Path) -> None:
    dense, small = pair()
    before = weights(small)
    wild = unirank.Heal(lr=0.3, passes=4, patience=1)
    healed = unirank.heal(small, words, wild, against=dense, work=tmp_path)
    for one in layers(healed):
        assert (one["best"], one["passes"]) == (0, 1)
        assert one["after"] == one["before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(healed).items())


@pytest.mark.parametrize(
    ("error", "asked", "lr"),
    [(0.5, None, 1e-3), (0.25, None, 1e-3), (0.01, None, 2e-4), (0.0, None, 0.0), (0.01, 0.2, 0.2)],
)
def test_a_layer_that_is_nearly_right_makes_small_steps(
    error: float, asked: float | None, lr: float, pair, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = pair()
    used: set[float] = set()
    plain = torch.optim.AdamW.step
    monkeypatch.setattr(Block, "error", lambda *_: error)

    def step(self: Any, *rest: Any, **more: Any) -> Any:
        used.add(self.param_groups[0]["lr"])
        return plain(self, *rest, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    settings = unirank.Heal(passes=1, lr=asked, warmup=0.0)
    healed = unirank.heal(small, words, settings, against=dense, work=tmp_path)
    assert [one["lr"] for one in layers(healed)] == [pytest.approx(lr)] * dense.layer_count
    assert max(used) == pytest.approx(lr)
    assert f"lr = {lr:.2g}," in (healed.save(tmp_path / "out") / "README.md").read_text()


def test_the_best_pass_is_kept(pair, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = pair()
    errors = iter([0.5, 0.4, 0.6, 0.45] * dense.layer_count)
    states: list[dict[str, torch.Tensor]] = []

    def planned(self: Block, _looks: Any) -> float:
        states.append(self.state())
        return next(errors)

    monkeypatch.setattr(Block, "error", planned)
    healed = unirank.heal(small, words, unirank.Heal(passes=3), against=dense, work=tmp_path)
    found = weights(healed)
    for index, one in enumerate(layers(healed)):
        assert one == {"before": 0.5, "after": 0.4, "passes": 3, "best": 1, "metric": False, "lr": 1e-3}
        for name, tensor in states[4 * index + 1].items():
            assert torch.equal(found[f"{dense.layers}.{index}.{name}"], tensor)


def test_a_second_text_counts_as_much_as_the_first(pair, words, tmp_path: Path, monkeypatch) -> None:
    dense, small = pair()
    second = tmp_path / "second.txt"
    second.write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(200)))
    errors: list[list[float]] = []
    original = Block.error

    def watched(self: Block, looks: Any) -> float:
        errors.append([original(self, [look]) for look in looks])
        return original(self, looks)

    monkeypatch.setattr(Block, "error", watched)
    healed = unirank.heal(small, words, QUICK, against=dense, second_text=str(second), work=tmp_path / "work")
    assert {len(pair) for pair in errors} == {2}
    assert layers(healed)[0]["before"] == pytest.approx(sum(errors[0]) / 2)
    assert healed.training is not None
    data = healed.training["data"]
    assert data["second"]["text"] == "second.txt"
    assert (data["train_windows"], data["held_out_windows"]) == (18, 2)


def test_a_model_in_bfloat16_stays_in_it_and_gets_better(pair, words, tmp_path: Path) -> None:
    dense, small = pair(dtype=torch.bfloat16)
    held_out = draw(dense, words, None, QUICK.held_out).looks[0]
    before = stream_error(dense, small, held_out)
    for precision in ("float32", "bfloat16"):
        settings = unirank.Heal(precision=precision, mix=1.0)
        healed = unirank.heal(small, words, settings, against=dense, work=tmp_path / precision)
        assert {tensor.dtype for tensor in healed.model.parameters()} == {torch.bfloat16}
        after = stream_error(dense, healed, held_out)
        assert after < before
        before = after


def test_parameters_that_two_layers_share_stay(pair, words, tmp_path: Path) -> None:
    dense, small = pair()
    blocks = list(small.model.get_submodule(dense.layers).children())
    blocks[1].input_layernorm.weight = blocks[0].input_layernorm.weight
    before = blocks[0].input_layernorm.weight.detach().clone()
    unirank.heal(small, words, QUICK, against=dense, work=tmp_path)
    assert torch.equal(blocks[0].input_layernorm.weight, before)


def test_the_rate_rises_and_falls_to_nearly_nothing() -> None:
    rates = [_rate(step, 40, 0.1) for step in range(40)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert _rate(0, 1, 0.0) == 1.0


def test_low_rank_layers_that_share_a_product_are_healed_too(pair, words, tmp_path: Path) -> None:
    """`fuse` makes `right.weight` a view of a stack; what is written to it must show in the product."""
    dense, small = pair()
    expected = unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "plain")
    dense, small = pair()
    unirank.fuse(small.model)
    assert any(isinstance(m, LowRankLinear) and m.shared is not None for m in small.model.modules())
    fused = unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "fused")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(fused.model(ids).logits, expected.model(ids).logits, rtol=1e-2, atol=1e-3)
