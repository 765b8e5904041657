"""Healing lowers the error of every layer, keeps ranks, resumes to the same bytes, and needs one layer at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.stores import contents
from tests.support.tiny import WORDS, build
from unirank.compression.checkpoint import PROVENANCE_FILE, CompressedModel, read_record
from unirank.errors import InputError, NonFiniteError
from unirank.finetuning import loop
from unirank.finetuning.block import Block, _rate
from unirank.finetuning.healing_streams import Group
from unirank.finetuning.healing_text import draw
from unirank.models.low_rank import LowRankLinear, count_parameters
from unirank.report.gather import gather
from unirank.report.page import page
from unirank.types import LoadedModel

FAMILIES = ("llama", "llama-bias", "gemma3", "gpt-neox", "gpt2", "opt")
QUICK = unirank.Heal(passes=2, batch=4)


@pytest.fixture
def words(text_file: Path) -> unirank.Calibration:
    """20 windows of 24 tokens."""
    return unirank.Calibration(text=str(text_file), windows=20, window=24)


@pytest.fixture
def pair(make_model, calibration):
    """`pair("llama") -> (dense, compressed)`, both in memory, 40 % removed."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any):
        dense = make_model(name)
        dense.model.to(dtype)
        return dense, unirank.compress(dense, 0.4, calibration=calibration, copy=True, **options)

    return make


@pytest.fixture
def on_disk(tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    """A directory with `dense`, a tiny Gemma, and `small`, 40 % removed."""
    build("gemma3").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    unirank.compress(tmp_path / "dense", 0.4, calibration=calibration, device="cpu").save(tmp_path / "small")
    return tmp_path


def weights(compressed: CompressedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in compressed.model.state_dict().items()}


def layers(healed: CompressedModel) -> list[dict[str, Any]]:
    assert healed.training is not None
    return healed.training["layers"]


def stream_error(dense: LoadedModel, compressed: CompressedModel, windows: torch.Tensor) -> float:
    """Mean over tokens of the squared relative error of what leaves the last layer, when both models run whole."""
    seen = []
    for model in (dense.model, compressed.model):
        last = list(model.get_submodule(dense.layers).children())[-1]

        def catch(_module: Any, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = last.register_forward_hook(catch)
        with torch.no_grad():
            model(input_ids=windows, use_cache=False)
        handle.remove()
    x, own = (hidden.double() for hidden in seen)
    return float(((x - own).square().sum(-1) / x.square().sum(-1)).mean())


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
        assert one == {"before": 0.5, "after": 0.4, "passes": 3, "best": 1}
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


DISTILL = unirank.Heal(passes=1, batch=4, patience=0, distill_steps=12, distill_lr=3e-3)


@pytest.fixture
def counting(tmp_path: Path) -> unirank.Calibration:
    """Words that count in steps of 7."""
    (tmp_path / "counting.txt").write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(1000)))
    return unirank.Calibration(text=str(tmp_path / "counting.txt"), windows=20, window=24)


def divergence(dense: LoadedModel, model: Any, windows: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (one(windows).logits.double().log_softmax(-1) for one in (dense.model, model))
    return float((p.exp() * (p - q)).sum(-1)[:, :-1].mean())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distillation_trains_all_factors_towards_the_dense_model(dtype, pair, counting, tmp_path: Path) -> None:
    dense, small = pair(dtype=dtype)
    plain = dataclasses.replace(DISTILL, distill_steps=0)
    healed = unirank.heal(small, counting, plain, against=dense, work=tmp_path / "plain")
    assert healed.training is not None
    assert healed.training["distilled"] is None
    held_out = draw(dense, counting, None, 0.1).looks[0]
    before, far = weights(healed), divergence(dense, healed.model, held_out)
    dense, small = pair(dtype=dtype)
    stages = []
    after = unirank.heal(
        small,
        counting,
        DISTILL,
        against=dense,
        work=tmp_path / "work",
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert after.training is not None
    distilled = after.training["distilled"]
    assert distilled["held_out_after"] < 0.9 * distilled["held_out_before"]
    assert [entry for entry in distilled["log"] if "eval_loss" in entry][-1]["step"] == 12
    assert distilled["held_out_before"] == pytest.approx(far, rel=1e-2)
    assert distilled["held_out_after"] == pytest.approx(divergence(dense, after.model, held_out), rel=1e-2)
    assert ("distill", 12, 12) in stages
    factors = {name for name in before if ".left." in name or ".right." in name}
    assert {name for name, tensor in weights(after).items() if not torch.equal(tensor, before[name])} == factors
    assert {parameter.dtype for parameter in after.model.parameters()} == {dtype}
    assert after.model.config.use_cache
    assert not any(module.training for module in after.model.modules())
    assert all(parameter.requires_grad for parameter in after.model.parameters())
    kept = {path.name for path in (tmp_path / "work").iterdir()}
    assert kept == {"heal.json", "distilled.safetensors", *(f"layer-0000{i}.safetensors" for i in range(3))}
    card = after.save(tmp_path / "out") / "README.md"
    assert "; then 12 steps of distillation, divergence on held-out windows " in card.read_text()


@pytest.mark.slow
def test_distillation_that_does_not_help_changes_nothing(pair, counting, tmp_path: Path) -> None:
    dense, small = pair()
    plain = dataclasses.replace(DISTILL, distill_steps=0)
    before = weights(unirank.heal(small, counting, plain, against=dense, work=tmp_path / "plain"))
    dense, small = pair()
    wild = dataclasses.replace(DISTILL, distill_lr=1.0)
    after = unirank.heal(small, counting, wild, against=dense, work=tmp_path / "work")
    assert after.training is not None
    assert after.training["distilled"]["held_out_after"] == after.training["distilled"]["held_out_before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(after).items())


@pytest.mark.slow
def test_a_killed_distillation_resumes_to_the_same_bytes(
    on_disk: Path, counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(work: str) -> CompressedModel:
        place, dense = tmp_path / work, on_disk / "dense"
        return unirank.heal(on_disk / "small", counting, DISTILL, against=dense, work=place, device="cpu")

    run("whole").save(tmp_path / "expected")
    original = loop._Trainer.compute_loss

    def killed(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 7 and model.training:
            raise _Killed
        return original(self, model, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "compute_loss", killed)
        with pytest.raises(_Killed):
            run("work")
    assert (tmp_path / "work" / "distill" / "checkpoint-7" / "model.safetensors").is_file()
    steps = []

    def watched(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        if model.training:
            steps.append(self.state.global_step)
        return original(self, model, *arguments, **options)

    monkeypatch.setattr(loop._Trainer, "compute_loss", watched)
    run("work").save(tmp_path / "found")
    assert steps == [7, 8, 9, 10, 11]
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")
    run("work").save(tmp_path / "again")
    assert len(steps) == 5
    assert contents(tmp_path / "again") == contents(tmp_path / "expected")


class _Killed(BaseException):
    pass


def _kill_in(index: int):
    """A `Group.advance` that ends the run in a layer, before anything of it is written."""
    original = Group.advance

    def advance(self: Group, layer: Any, at: int) -> None:
        if at == index:
            raise _Killed
        original(self, layer, at)

    return advance


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_killed_run_resumes_to_the_same_bytes(
    stream: bool, on_disk: Path, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(work: str) -> CompressedModel:
        small = unirank.open_compressed(on_disk / "small", device="cpu", stream=stream)
        return unirank.heal(small, words, QUICK, against=on_disk / "dense", work=tmp_path / work)

    run("whole").save(tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(Group, "advance", _kill_in(2))
        with pytest.raises(_Killed):
            run("work")
    kept = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert kept == ["heal.json", "layer-00000.safetensors", "layer-00001.safetensors", "stream-00002.safetensors"]
    trained = []
    original = Block.train

    def watched(self: Block, *arguments: Any, **options: Any) -> Any:
        trained.append(self._index)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Block, "train", watched)
    run("work").save(tmp_path / "found")
    assert trained == [2, 3]
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")
    # Nothing is trained again once all is there; streams that were lost are made again from the layers.
    run("work")
    assert trained == [2, 3]
    (tmp_path / "work" / "layer-00003.safetensors").unlink()
    run("work").save(tmp_path / "again")
    assert trained == [2, 3, 3]
    assert contents(tmp_path / "again") == contents(tmp_path / "expected")


def test_streamed_is_what_it_is_in_memory_with_one_layer_there(
    on_disk: Path, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resident(model: Any) -> set[str]:
        return {name.split(".")[0] for name, p in model.model.layers.named_parameters() if not p.is_meta}

    expected = unirank.heal(
        on_disk / "small", words, QUICK, against=on_disk / "dense", work=tmp_path / "a", device="cpu"
    )
    small = unirank.open_compressed(on_disk / "small", device="cpu", stream=True)
    dense = unirank.load(on_disk / "dense", device="cpu", stream=True)
    seen = []
    original = Block.train

    def watched(self: Block, *arguments: Any, **options: Any) -> Any:
        seen.append((resident(small.model), resident(dense.model)))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Block, "train", watched)
    healed = unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "b")
    assert seen == [({str(i)}, set()) for i in range(4)]
    assert resident(small.model) == set()
    assert healed.training == expected.training
    for kind, model in (("whole", expected), ("streamed", healed)):
        model.save(tmp_path / kind)
    assert contents(tmp_path / "whole") == contents(tmp_path / "streamed")


def test_a_streamed_model_is_not_distilled(on_disk: Path, words, tmp_path: Path) -> None:
    small = unirank.open_compressed(on_disk / "small", device="cpu", stream=True)
    with pytest.raises(
        InputError, match=r"Heal\.distill_steps needs the whole model in memory; load it without stream"
    ):
        unirank.heal(small, words, DISTILL, against=on_disk / "dense", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


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


def test_card_and_report_show_all_trainings_in_their_order(pair, words, text_file: Path, tmp_path: Path) -> None:
    dense, small = pair()
    once = unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "one")
    assert once.training is not None
    assert once.training["settings"] == dataclasses.asdict(QUICK)
    out = once.save(tmp_path / "once")
    line = next(line for line in (out / "README.md").read_text().splitlines() if line.startswith("| healed |"))
    assert "3 of 3 layers, at most 2 passes over 18 windows of 24 tokens of `words.txt`, mix = 0.5" in line
    assert read_record(out).training == once.training
    tuning = unirank.Finetune(steps=2, window=24, rank=2)
    tuned = unirank.finetune(out, str(text_file), tuning, work=tmp_path / "two", device="cpu")
    twice = unirank.heal(tuned, words, QUICK, against=dense, work=tmp_path / "three").save(tmp_path / "thrice")
    rows = [line.split("|")[1].strip() for line in (twice / "README.md").read_text().splitlines() if "| " in line]
    assert [row for row in rows if row[:1].isdigit()] == ["1. healed", "2. fine-tuned", "3. healed"]
    shown = page(gather(twice, None, None))
    titles = re.findall("<h2>(Healing|Fine-tuning)</h2>", shown)
    assert titles == ["Healing", "Fine-tuning", "Healing"]
    assert "Fine-tuning came after that. Healing came after that." in shown
    assert re.findall("<pre>unirank (compress|heal)", shown) == ["compress", "heal"]


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda record: record.update(kind="magic"), "the kind of its training is 'magic'"),
        (lambda record: record["settings"].pop("mix"), "the settings of its training have no mix"),
        (lambda record: record["layers"][1].update(after="low"), "after is 'low'"),
        (lambda record: record.update(distilled={}), "it has no held_out_before"),
        (lambda record: record["data"].pop("second"), "it has no second"),
        (lambda record: record.update(before_that={"settings": {}}), "it has no data"),
    ],
)
def test_a_record_that_was_damaged_is_refused(harm: Any, sentence: str, pair, words, tmp_path: Path) -> None:
    dense, small = pair()
    out = unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "work").save(tmp_path / "out")
    record = json.loads((out / PROVENANCE_FILE).read_text())
    harm(record["training"])
    (out / PROVENANCE_FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"provenance\.json is missing or damaged: .*{sentence}"):
        unirank.open_compressed(out)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_ends_it_with_layer_and_step(
    kind: str, pair, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = pair()
    before = weights(small)
    calls = 0
    original = Block._step

    def poisoned(self: Block, call: Any, x: Any, aim: Any, *rest: Any) -> None:
        nonlocal calls
        calls += 1
        if self._index == 1 and calls % 10 == 3:
            if kind == "loss":
                aim = dataclasses.replace(aim, weight=aim.weight * math.nan)
            else:
                next(iter(self._masters.values())).register_hook(lambda gradient: gradient * math.inf)
        original(self, call, x, aim, *rest)

    monkeypatch.setattr(Block, "_step", poisoned)
    with pytest.raises(NonFiniteError, match=rf"The {kind} of layer 1 is NaN or infinity at step 3; a lower Heal.lr"):
        unirank.heal(small, words, QUICK, against=dense, work=tmp_path)
    found = weights(small)
    rest = [name for name in found if not name.startswith(f"{dense.layers}.0.")]
    assert all(torch.equal(found[name], before[name]) for name in rest)  # layer 0 is healed, layer 1 as it was


def test_a_dense_model_that_is_damaged_is_named(pair, words, tmp_path: Path) -> None:
    dense, small = pair()
    dense.model.get_parameter(f"{dense.layers}.1.input_layernorm.weight").data[0] = math.nan
    with pytest.raises(NonFiniteError, match="The output of layer 1 of the dense model is NaN or infinity"):
        unirank.heal(small, words, QUICK, against=dense, work=tmp_path)


def test_parameters_that_two_layers_share_stay(pair, words, tmp_path: Path) -> None:
    dense, small = pair()
    blocks = list(small.model.get_submodule(dense.layers).children())
    blocks[1].input_layernorm.weight = blocks[0].input_layernorm.weight
    before = blocks[0].input_layernorm.weight.detach().clone()
    unirank.heal(small, words, QUICK, against=dense, work=tmp_path)
    assert torch.equal(blocks[0].input_layernorm.weight, before)


def test_another_run_does_not_take_the_directory(pair, words, tmp_path: Path, calibration) -> None:
    dense, small = pair()
    unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "work")
    fresh = unirank.compress(dense, 0.4, calibration=calibration, copy=True)
    with pytest.raises(InputError, match=r"another healing; it differs in settings.lr \(there: 0.001, now: 0.1\)"):
        unirank.heal(fresh, words, dataclasses.replace(QUICK, lr=0.1), against=dense, work=tmp_path / "work")


def test_a_run_that_was_killed_in_its_first_file_resumes(pair, words, tmp_path: Path) -> None:
    dense, small = pair()
    left = tmp_path / "work" / ".heal.json.unirank-abc.tmp"
    left.mkdir(parents=True)
    unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "work")
    assert not left.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"was not made by unirank \(it has no heal\.json\)"):
        unirank.heal(small, words, QUICK, against=dense, work=tmp_path / "mine")


def test_what_cannot_be_used_is_refused_before_anything_is_made(pair, make_model, words, tmp_path: Path) -> None:
    dense, small = pair()
    (tmp_path / "short.txt").write_text("w1 " * 49)
    work = tmp_path / "work"
    other = make_model("llama", intermediate_size=40)
    half = make_model("llama")
    half.model.to(torch.bfloat16)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (tmp_path / "nowhere", words, {}, "does not exist"),
        (dataclasses.replace(small, model=dense.model), words, {}, "no low-rank layers"),
        (small, str(tmp_path / "nothing.txt"), {}, "is not a file; legal are"),
        (small, 3, {}, "calibration = 3 is not legal"),
        (small, dataclasses.replace(words, text=tmp_path / "short.txt"), {}, "it has 49 tokens, and 50 are needed"),
        (
            small,
            dataclasses.replace(words, windows=1),
            {},
            "Calibration.windows = 1 is not legal here: the text words.txt gives 1",
        ),
        (small, words, {"second_text": "nothing.txt"}, "is not a file; legal are"),
        (small, words, {"second_text": str(tmp_path / "short.txt"), "against": other}, "does not fit: its linears"),
        (small, words, {"against": half}, "The dense model is bfloat16 on cpu and the compressed one float32 on cpu"),
        (small, words, {"against": str(tmp_path / "nowhere")}, "name it with against=: "),
        (small, words, {"against": None}, "name it with against=: "),
    ]
    for model, calibration, options, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            unirank.heal(model, calibration, QUICK, work=work, **({"against": dense} | options))
        assert not work.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill_steps": -1}, "distill_steps = -1 is not legal; it must be at least 0"),
        ({"distill_lr": 0.0}, "distill_lr = 0.0 is not legal; it must be above 0"),
        ({"mix": 1.5}, "mix = 1.5 is not legal; it must be at least 0 and at most 1"),
        ({"batch": 0}, "batch = 0 is not legal; it must be at least 1"),
        ({"passes": 0}, "passes = 0 is not legal; it must be at least 1"),
        ({"lr": math.inf}, "lr = inf is not legal"),
        ({"warmup": 1.0}, "warmup = 1.0 is not legal"),
        ({"held_out": 0.0}, "held_out = 0.0 is not legal"),
        ({"patience": -1}, "patience = -1 is not legal"),
        ({"precision": "fp8"}, "precision = 'fp8' is not legal; it must be auto, float32, bfloat16"),
    ],
)
def test_settings_that_are_not_legal_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        unirank.Heal(**changes)


def test_train_and_held_out_windows_share_no_token(make_model, words, tmp_path: Path) -> None:
    """Of a short text, random windows for both would overlap."""
    loaded = make_model()
    (tmp_path / "text.txt").write_text(" ".join([*("w1 " * 60).split(), *("w2 " * 30).split()]))
    short = dataclasses.replace(words, text=str(tmp_path / "text.txt"))
    drawn = draw(loaded, short, None, 0.1)
    assert (drawn.train.shape, drawn.looks[0].shape) == ((18, 24), (2, 24))
    assert set(drawn.train.flatten().tolist()) == {WORDS.index("w1"), WORDS.index("w2")}
    assert set(drawn.looks[0].flatten().tolist()) == {WORDS.index("w2")}


def test_windows_of_several_texts_are_shared_out(make_model, words, tmp_path: Path) -> None:
    loaded = make_model()
    for name in ("w3", "w4"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 100)
    names = [tmp_path / "w3.txt", tmp_path / "w4.txt"]
    drawn = draw(loaded, dataclasses.replace(words, text=names, shares=(3, 1)), None, 0.2)
    counts = [
        [int((windows[:, 0] == WORDS.index(w)).sum()) for w in ("w3", "w4")] for windows in (drawn.train, *drawn.looks)
    ]
    assert counts == [[12, 4], [3, 1]]
    assert drawn.as_dict()["text"] == "w3.txt,w4.txt"


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
