"""What a healing records, which windows it takes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.healing import QUICK, weights
from tests.support.tiny import WORDS
from unirank.compression.checkpoint import PROVENANCE_FILE, read_record
from unirank.errors import InputError, NonFiniteError
from unirank.finetuning.block import Block
from unirank.finetuning.healing_text import draw
from unirank.report.gather import gather
from unirank.report.page import page


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
        (lambda record: record["layers"][1].update(lr="fast"), "lr is 'fast'"),
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
        ({"passes": -1}, "passes = -1 is not legal; it must be at least 0"),
        ({"passes": 0}, "passes and distill_steps are both 0: nothing would be trained"),
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


@pytest.mark.filterwarnings("ignore:The text:unirank.UnirankWarning")  # it is short on purpose
def test_train_and_held_out_windows_share_no_token(make_model, words, tmp_path: Path) -> None:
    """Of a short text, random windows for both would overlap."""
    loaded = make_model()
    (tmp_path / "text.txt").write_text(" ".join([*("w1 " * 60).split(), *("w2 " * 30).split()]))
    short = dataclasses.replace(words, text=str(tmp_path / "text.txt"))
    drawn = draw(loaded, short, None, 0.1)
    assert (drawn.train.shape, drawn.looks[0].shape) == ((18, 24), (2, 24))
    assert set(drawn.train.flatten().tolist()) == {WORDS.index("w1"), WORDS.index("w2")}
    assert set(drawn.looks[0].flatten().tolist()) == {WORDS.index("w2")}


@pytest.mark.filterwarnings("ignore:The text:unirank.UnirankWarning")  # it is short on purpose
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


def test_a_text_that_is_too_short_for_its_windows_is_said(make_model, words, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(" ".join(WORDS[2 + i % 94] for i in range(240)))
    short = dataclasses.replace(words, text=str(tmp_path / "short.txt"))
    with pytest.warns(
        unirank.UnirankWarning, match="has 215 tokens, which is 8 windows of 24 side by side; 18 windows"
    ):
        draw(make_model(), short, None, 0.1)
    with pytest.raises(unirank.InputError, match="at most 191 different windows of 24"):
        draw(make_model(), dataclasses.replace(short, windows=400), None, 0.1)
