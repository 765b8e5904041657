"""Targets in the user's units: what is chosen holds, is the most, and is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import unirank
from unirank import InputError, Target
from unirank.cli.amounts import read_bytes, read_count, read_share
from unirank.disk.files import bytes_on_disk
from unirank.evaluation.perplexity import evaluate
from unirank.tradeoff import choosing
from unirank.tradeoff.choosing import TargetChooser

CALIBRATION: dict[str, Any] = {"windows": 6, "window": 24, "batch": 2}
WINDOWS: dict[str, Any] = {"window": 24, "limit": 3}


@pytest.fixture(scope="module")
def store(dense: Path, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    place = tmp_path_factory.mktemp("store") / "whiten"
    calibration = unirank.Calibration(text=str(text_file), **CALIBRATION)
    unirank.analyze(dense, place, calibration=calibration, device="cpu")
    return place


def compress(dense: Path, store: Path, target: Target, text_file: Path, **more: Any) -> unirank.CompressedModel:
    return unirank.compress(dense, target=target, store=store, calibration=str(text_file), device="cpu", **more)


def test_a_perplexity_holds_on_its_text(dense: Path, store: Path, text_file: Path, tmp_path: Path) -> None:
    target = Target(max_perplexity_increase=0.02, text=str(text_file), evaluations=5, **WINDOWS)
    made = compress(dense, store, target, text_file)
    loaded = unirank.load(str(dense), device="cpu")
    before = evaluate(loaded.model, loaded.tokenizer, text=str(text_file), **WINDOWS).perplexity
    made.save(tmp_path / "out")
    opened = unirank.open_compressed(tmp_path / "out", device="cpu")
    after = evaluate(opened.model, opened.tokenizer, text=str(text_file), **WINDOWS).perplexity
    assert after <= 1.02 * before
    assert made.plan.remove > 0
    (kept,) = opened.evaluations
    assert (kept["report"]["perplexity"], kept["dense"]) == (after, before)


def test_nothing_within_the_limit_is_said(dense: Path, store: Path, text_file: Path, monkeypatch) -> None:
    monkeypatch.setattr(choosing, "increase_of", lambda point, dense: 1.0)  # of a random model it may be below 0
    target = Target(max_perplexity_increase=0.1, text=str(text_file), evaluations=1, **WINDOWS)
    with pytest.raises(InputError, match=r"is not met at any fraction that was tried; the least, 0\.1, gives \+100"):
        compress(dense, store, target, text_file)


@pytest.mark.parametrize("form", ["factors", "pivoted"])
def test_parameters_are_met_closely(form: Any, dense: Path, store: Path, text_file: Path) -> None:
    loaded = unirank.load(str(dense), device="cpu")
    total = sum(p.numel() for p in loaded.model.parameters())
    made = compress(dense, store, Target(params=total - 2000), text_file, form=form)
    assert total - 2100 < made.report.model_after <= total - 2000


@pytest.mark.parametrize("bits", [None, 8])
def test_bytes_are_met_on_disk(bits: int | None, dense: Path, store: Path, text_file: Path, tmp_path: Path) -> None:
    if bits is not None:
        pytest.importorskip("torchao")
    whole = bytes_on_disk(dense)
    limit = int(0.85 * whole) if bits is None else int(0.46 * whole)
    made = compress(dense, store, Target(size=limit, bits=bits), text_file, form="pivoted")
    if bits is not None:
        made = unirank.quantize(made, bits)
    made.save(tmp_path / "out")
    # Headers are counted at their most, which shows in a model that is as small as this one.
    assert 0.8 * limit < bytes_on_disk(tmp_path / "out") <= limit


def test_the_default_text_is_what_calibration_left(dense: Path, text_file: Path, tmp_path: Path) -> None:
    words = " ".join(text_file.read_text().split())
    long = tmp_path / "long.txt"
    long.write_text(" ".join([words] * 20))
    chooser = TargetChooser(Target(max_perplexity_increase=0.5, evaluations=2), tmp_path / "curve")
    calibration = unirank.Calibration(text=str(long), windows=2, window=24, batch=2)
    job = unirank.job.Job(
        remove=None,
        ranks=None,
        recipe=unirank.recipe(),
        min_rank=1,
        multiple_of=None,
        calibration=calibration,
        choose=chooser,
    )
    made = job.run(str(dense), tmp_path / "store", device="cpu")
    assert made is not None
    assert chooser.reached is not None
    assert chooser.reached.text is not None
    assert chooser.reached.text == str(tmp_path / "curve" / "held-out.txt")
    report = evaluate(made.model, made.tokenizer, text=chooser.reached.text)
    assert chooser.reached.point is not None
    assert report.perplexity == chooser.reached.point.evaluations[0].perplexity
    json.dumps(chooser.reached.as_dict())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of max_perplexity_increase=, params= and size=; none was given"),
        ({"params": 5, "size": 5}, "params= and size= was given"),
        ({"max_perplexity_increase": 0}, "it is a fraction above 0"),
        ({"max_perplexity_increase": "10%"}, "it is a fraction above 0"),
        ({"max_perplexity_increase": 0.1, "evaluations": 0}, "evaluations = 0 is not legal"),
        ({"params": 1.5}, "it must be a whole number"),
        ({"size": True}, "it must be a whole number"),
        ({"params": 5, "bits": 8}, "it needs size="),
        ({"size": 5, "bits": 3}, "bits = 3"),
    ],
)
def test_targets_that_are_not_legal(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Target(**given)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"params": 10}, "params = 10 cannot be reached: with 90% of the decoder's weights removed, "),
        ({"params": 10**9}, "Nothing has to be removed: the dense model has "),
        ({"size": 10}, "size = 10 cannot be reached"),
        ({"params": 20_000, "text": "x"}, "text= is of the perplexity"),
        ({"max_perplexity_increase": 0.1, "text": "nowhere.txt"}, "'nowhere.txt' is not a file"),
    ],
)
def test_what_cannot_be_had_is_said(
    target: dict[str, Any], said: str, dense: Path, store: Path, text_file: Path
) -> None:
    with pytest.raises(InputError, match=said):
        compress(dense, store, Target(**target), text_file)


def test_a_target_stands_alone(dense: Path) -> None:
    with pytest.raises(InputError, match="remove= and target= was given"):
        unirank.compress(dense, 0.2, target=Target(params=5))
    with pytest.raises(InputError, match="measuring perplexities would run the whole model"):
        unirank.compress(dense, target=Target(max_perplexity_increase=0.1), stream=True)


def test_amounts_as_people_write_them() -> None:
    assert [read_share("--x", given) for given in ("10%", "0.1", "2.5 %", ".5")] == [0.1, 0.1, 0.025, 0.5]
    assert [read_count("--x", given) for given in ("100M", "1.5B", "12k", "7")] == [10**8, 15 * 10**8, 12_000, 7]
    assert [read_bytes("--x", given) for given in ("200MB", "1.5gb", "1KiB", "5")] == [2 * 10**8, 15 * 10**8, 1024, 5]
    for read, given in ((read_share, "10x"), (read_count, "5%"), (read_bytes, "5M"), (read_bytes, "-3MB")):
        with pytest.raises(InputError, match=f"--x {given} is not legal"):
            read("--x", given)
