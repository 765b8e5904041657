"""What was measured of a checkpoint, beside its weights: evaluations.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unirank.compression.card import EVALUATIONS_FILE
from unirank.disk.strictjson import Damaged, entry, number, read_object
from unirank.errors import InputError
from unirank.evaluation.perplexity import EvalReport
from unirank.evaluation.speed import Speed

_SAME = ("text_sha256", "window", "windows", "dtype", "bos")  # two perplexities of these are of the same windows
_SAMPLE = ("prompt", "dense", "model")

Evaluation = Mapping[str, Any]
"""One call of `eval`, as JSON holds it.

`report`, an `EvalReport` as a dict; `dense`, the dense model's perplexity on the same windows, or None. Where they were
measured in the same call: `speed`, `{"dense": ..., "model": ...}` with a `Speed` as a dict each; and `sample`,
`{"prompt": ..., "dense": ..., "model": ...}`, greedy continuations.
"""


def read_evaluations(path: Path) -> tuple[Evaluation, ...]:
    """Those of the checkpoint at `path`, the newest last. Raises InputError where the file is damaged."""
    file = path / EVALUATIONS_FILE
    if not file.is_file():
        return ()
    try:
        return tuple(_checked(one) for one in entry(read_object(file), "evaluations", list))
    except Damaged as error:
        raise InputError(f"{file} is damaged: {error}.") from error


def evaluation_of(
    report: EvalReport,
    *,
    dense: EvalReport | None = None,
    speed: tuple[Speed, Speed] | None = None,
    sample: tuple[str, str, str] | None = None,
) -> dict[str, Any]:
    """The record of one call. Pairs are of the dense model and this one; a sample's prompt comes first."""
    found: dict[str, Any] = {"report": report.as_dict(), "dense": None if dense is None else dense.perplexity}
    if speed is not None:
        found["speed"] = {"dense": speed[0].as_dict(), "model": speed[1].as_dict()}
    if sample is not None:
        found["sample"] = dict(zip(_SAMPLE, sample, strict=True))
    return found


def with_newest(known: Iterable[Evaluation], added: Evaluation) -> tuple[Evaluation, ...]:
    """`known` with `added` in the place of what was measured on the same text before.

    What `added` leaves out is kept from there: speed and sample, and the dense perplexity where it is of the same
    windows.
    """
    rest, newest = [], dict(added)
    for old in known:
        if old["report"]["text_sha256"] != added["report"]["text_sha256"]:
            rest.append(old)
            continue
        newest = {key: old[key] for key in ("speed", "sample") if key in old} | newest
        if newest["dense"] is None and all(old["report"][key] == added["report"][key] for key in _SAME):
            newest["dense"] = old["dense"]
    return (*rest, newest)


def _checked(one: Any) -> dict[str, Any]:
    """The record of one call as `evaluation_of` makes it. Raises Damaged for anything else."""
    dense = entry(one, "dense", int, float, type(None))
    found: dict[str, Any] = {
        "report": asdict(EvalReport.from_dict(entry(one, "report", dict))),
        "dense": None if dense is None else number(dense, "dense"),
    }
    if "speed" in one:
        pair = entry(one, "speed", dict)
        found["speed"] = {key: Speed.from_dict(entry(pair, key, dict)).as_dict() for key in ("dense", "model")}
    if "sample" in one:
        texts = entry(one, "sample", dict)
        found["sample"] = {key: entry(texts, key, str) for key in _SAMPLE}
    return found
