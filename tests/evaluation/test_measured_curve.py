"""The records of a curve: JSON there and back, and everything else refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.support.measured import a_curve, a_point
from unirank.errors import InputError
from unirank.evaluation.measured_curve import Curve


def test_json_there_and_back_is_the_same_curve() -> None:
    curve = a_curve()
    assert Curve.from_json(curve.to_json()) == curve
    timed = replace(curve, points=(replace(a_point("fast", 0.2), tokens_per_second={"prefill": 9.5, "decode": 2.0}),))
    assert Curve.from_json(timed.to_json()) == timed


def test_the_points_of_a_preset_begin_at_the_dense_model_and_rise() -> None:
    curve = a_curve()
    assert [point.remove for point in curve.of("unirank")] == [0.0, 0.1, 0.2]
    assert curve.of("fast")[0] is curve.dense
    assert curve.presets == ("unirank", "fast")
    assert curve.texts == ("first", "second")
    with pytest.raises(InputError, match="no preset 'best'; it has: unirank, fast"):
        curve.of("best")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format",), 2),
        (("model",), 3),
        (("meta",), []),
        (("points",), {}),
        (("dense", "preset"), "unirank"),
        (("dense", "remove"), 0.1),
        (("points", 0, "remove"), 1.0),
        (("points", 0, "remove"), True),
        (("points", 0, "removed_of_model"), 1),
        (("points", 0, "used"), -1),
        (("points", 0, "parameters"), 1.5),
        (("points", 0, "flops"), 2**63),
        (("points", 0, "bytes"), [1]),
        (("points", 0, "bytes", "float32"), "1"),
        (("points", 0, "seconds"), -1.0),
        (("points", 0, "tokens_per_second"), {"decode": 0.0}),
        (("points", 0, "evaluations"), []),
        (("points", 0, "evaluations", 0, "perplexity"), "low"),
        (("points", 0, "evaluations", 0, "text_sha256"), "another"),
        (("points", 0, "more"), 1),
        (("more",), 1),
    ],
)
def test_anything_else_is_no_curve(where: tuple[Any, ...], value: Any) -> None:
    record = json.loads(a_curve().to_json())
    inner = record
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(InputError, match="This is not a unirank curve: "):
        Curve.from_json(json.dumps(record))


def test_text_that_is_no_json_is_no_curve() -> None:
    for text in ("", "[]", '{"format": 1}', '{"format": NaN}'):
        with pytest.raises(InputError, match="This is not a unirank curve: "):
            Curve.from_json(text)
