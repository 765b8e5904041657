"""What was measured stays beside the weights: the newest of each text, and none of the weights' bytes change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import unirank
from unirank.compression.card import EVALUATIONS_FILE
from unirank.compression.checkpoint import add_evaluation, check_weights, read_record
from unirank.evaluation.perplexity import EvalReport
from unirank.evaluation.speed import Speed

REPORT = EvalReport(42.5, 3.75, "a.txt", "ab", 24, 3, 69, True, "float32", 1000)
DENSE = dataclasses.replace(REPORT, perplexity=30.0)
SPEED = (
    Speed(900.0, 10.0, 128, 16, 3, 1.1, "cpu", "float32", 2),
    Speed(990.0, 12.0, 128, 16, 3, 1.1, "cpu", "float32", 2),
)
SAMPLE = ("Once", " upon a time", " on a thyme")


@pytest.fixture
def small(make_model, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    return unirank.compress(make_model(), 0.4, calibration=calibration).save(tmp_path / "small")


def test_weights_and_card_stay_as_they_were(small: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in small.iterdir()}
    add_evaluation(small, REPORT, dense=DENSE, speed=SPEED, sample=SAMPLE, card=False)
    after = {file.name: file.read_bytes() for file in small.iterdir()}
    assert after.pop(EVALUATIONS_FILE)
    assert after == before
    record = read_record(small)
    check_weights(small, record)
    (one,) = record.evaluations
    assert one["report"] == REPORT.as_dict()
    assert one["dense"] == 30.0
    assert [Speed.from_dict(one["speed"][key]) for key in ("dense", "model")] == list(SPEED)
    assert one["sample"] == {"prompt": "Once", "dense": " upon a time", "model": " on a thyme"}
    again = unirank.open_compressed(small, device="cpu").save(tmp_path / "again")
    assert (again / EVALUATIONS_FILE).read_bytes() == (small / EVALUATIONS_FILE).read_bytes()


def test_the_newest_of_a_text_wins_and_keeps_what_it_did_not_measure(small: Path) -> None:
    add_evaluation(small, REPORT, dense=DENSE, speed=SPEED, sample=SAMPLE)
    add_evaluation(small, dataclasses.replace(REPORT, text="b.txt", text_sha256="cd"))
    add_evaluation(small, dataclasses.replace(REPORT, perplexity=41.0))
    other, newest = read_record(small).evaluations
    assert other["report"]["text"] == "b.txt"
    assert (newest["report"]["perplexity"], newest["dense"]) == (41.0, 30.0)
    assert newest["speed"]["dense"] == SPEED[0].as_dict()
    assert newest["sample"]["model"] == " on a thyme"
    add_evaluation(small, dataclasses.replace(REPORT, windows=9))  # the dense one was of other windows
    newest = read_record(small).evaluations[-1]
    assert (newest["report"]["windows"], newest["dense"]) == (9, None)
    assert "a.txt` | 9 of 24 tokens" in (small / "README.md").read_text()


def test_records_of_before_are_read(small: Path) -> None:
    """Without speed and sample, with several windows of one text."""
    old = [{"report": REPORT.as_dict() | {"windows": count}, "dense": None} for count in (2, 3)]
    (small / EVALUATIONS_FILE).write_text(json.dumps({"evaluations": old}))
    assert list(read_record(small).evaluations) == old


@pytest.mark.parametrize(
    "more",
    [
        {"speed": {}},
        {"speed": {"dense": SPEED[0].as_dict()}},
        {"speed": {"dense": SPEED[0].as_dict(), "model": SPEED[1].as_dict() | {"decode": -1.0}}},
        {"sample": {"prompt": "a", "dense": "b"}},
        {"sample": {"prompt": "a", "dense": "b", "model": 3}},
        {"sample": ["a", "b", "c"]},
    ],
    ids=str,
)
def test_damage_is_named(small: Path, more: dict[str, object]) -> None:
    one = {"report": REPORT.as_dict(), "dense": 30} | more
    (small / EVALUATIONS_FILE).write_text(json.dumps({"evaluations": [one]}))
    with pytest.raises(unirank.InputError, match=r"evaluations\.json is damaged"):
        read_record(small)
