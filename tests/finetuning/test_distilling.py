"""The whole model at once, after healing: what it trains, what it leaves, and how it resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.healing import DISTILL, Killed, weights
from tests.support.stores import contents
from unirank.compression.checkpoint import CompressedModel
from unirank.errors import InputError
from unirank.finetuning import distilling, loop
from unirank.finetuning.healing_text import draw
from unirank.types import LoadedModel


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
    steps = "; then 12 steps of distillation on 24 windows and 24 that the dense model wrote, divergence on held-out "
    assert steps in card.read_text()


def test_every_step_has_windows_of_its_own_and_none_is_held_out(pair, words) -> None:
    own, _ = pair()
    drawn = draw(own, words, None, 0.1, 48)
    assert drawn.whole is not None
    assert len(drawn.whole) == len({tuple(window.tolist()) for window in drawn.whole}) == 48
    assert drawn.as_dict()["whole_windows"] == 48
    assert drawn.as_dict()["windows_sha256"] != draw(own, words, None, 0.1, 47).as_dict()["windows_sha256"]
    runs = [
        set(map(tuple, windows.unfold(1, 6, 1).flatten(0, 1).tolist())) for windows in (drawn.whole, drawn.looks[0])
    ]
    assert not runs[0] & runs[1]
    assert draw(own, words, None, 0.1).whole is None


def test_a_short_text_gives_what_it_has(pair, words, tmp_path: Path) -> None:
    own, _ = pair()
    short = tmp_path / "short.txt"
    short.write_text(" ".join(Path(words.text).read_text().split()[:90]))
    drawn = draw(own, dataclasses.replace(words, text=str(short), windows=3), None, 0.1, 1000)
    assert drawn.whole is not None
    assert len(drawn.whole) == 90 - 25 - 24  # places to begin before the held-out end


def test_of_several_texts_each_gives_its_share(pair, words, tmp_path: Path) -> None:
    own, _ = pair()
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(Path(words.text).read_text().split())))
    both = dataclasses.replace(words, text=f"{words.text},{other}", shares=(3, 1))
    drawn = draw(own, both, None, 0.1, 40)
    assert drawn.whole is not None
    alone = [draw(own, dataclasses.replace(words, text=str(text)), None, 0.1, 30).whole for text in (words.text, other)]
    mine = [sum(any(torch.equal(window, one) for one in windows) for window in drawn.whole) for windows in alone]
    assert mine == [30, 10]


@pytest.mark.parametrize(
    ("before", "asked", "lr"),
    [(0.9, None, 1e-4), (0.4, None, 1e-4), (0.1, None, 2.5e-5), (-1e-9, None, 0.0), (0.1, 3e-3, 3e-3)],
)
def test_what_is_near_the_dense_model_makes_small_steps(
    before: float, asked: float | None, lr: float, pair, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = pair()
    used = []
    monkeypatch.setattr(distilling, "mean_divergence", lambda *_: before)
    monkeypatch.setattr(
        distilling, "run", lambda *asked, **_: used.append(asked[4].lr) or (tmp_path / "distill").mkdir()
    )
    windows = draw(dense, words, None, 0.1, 4).train
    settings = unirank.Heal(distill_steps=1, distill_lr=asked)
    record = distilling.distill(
        small.model,
        dense.model,
        lambda _folder: windows,
        windows,
        settings,
        tmp_path,
        seed=0,
        bf16=False,
        progress=lambda *_: None,
    )
    assert used == [record["lr"]] == [pytest.approx(lr)]


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
def test_distillation_alone_goes_on_where_healing_ended(on_disk: Path, counting, tmp_path: Path) -> None:
    """The same weights as both in one run."""

    def run(model: Path, settings: unirank.Heal, work: str) -> CompressedModel:
        dense = on_disk / "dense"
        return unirank.heal(model, counting, settings, against=dense, work=tmp_path / work, device="cpu")

    whole = run(on_disk / "small", DISTILL, "whole")
    run(on_disk / "small", dataclasses.replace(DISTILL, distill_steps=0), "first").save(tmp_path / "healed")
    alone = run(tmp_path / "healed", dataclasses.replace(DISTILL, passes=0), "second")
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(whole).items())
    assert alone.training is not None
    assert alone.training["layers"] == []
    card = (alone.save(tmp_path / "out") / "README.md").read_text()
    assert "12 steps of distillation on 24 windows of 24 tokens of " in card
    unirank.write_report(tmp_path / "out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<h2>Healing</h2>") == 2


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
            raise Killed
        return original(self, model, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "compute_loss", killed)
        with pytest.raises(Killed):
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


def test_a_streamed_model_is_not_distilled(on_disk: Path, words, tmp_path: Path) -> None:
    small = unirank.open_compressed(on_disk / "small", device="cpu", stream=True)
    with pytest.raises(
        InputError, match=r"Heal\.distill_steps needs the whole model in memory; load it without stream"
    ):
        unirank.heal(small, words, DISTILL, against=on_disk / "dense", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
