"""What the first screen says of a checkpoint, as numbers: before, after, and how often the one goes into the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unirank.compression.evaluations import Evaluation
from unirank.report.gather import ReportData

BUSY = 1.5  # **choice**: turns that differ by more than this factor were on a busy machine
PHASES = {"prefill": "tokens a second, reading a prompt", "decode": "tokens a second, writing"}


@dataclass(frozen=True)
class Change:
    """One number of the dense model and of this one; None was not measured."""

    before: float | None
    after: float | None

    @property
    def times(self) -> float | None:
        """`after / before`, where that is a number above 0."""
        if self.before is None or self.after is None or self.before <= 0:
            return None
        ratio = self.after / self.before
        return ratio if math.isfinite(ratio) and ratio > 0 else None


def newest(data: ReportData) -> dict[str, Evaluation]:
    """The newest evaluation of each text, by the SHA-256 of the text."""
    return {one["report"]["text_sha256"]: one for one in data.record.evaluations}


def perplexities(data: ReportData) -> dict[str, Change]:
    """By the name of the text; of two texts of one name, with the beginning of their hashes."""
    found = list(newest(data).values())
    names = [one["report"]["text"] for one in found]
    keys = [
        f"{name} ({one['report']['text_sha256'][:8]})" if names.count(name) > 1 else name
        for name, one in zip(names, found, strict=True)
    ]
    return {key: Change(one["dense"], one["report"]["perplexity"]) for key, one in zip(keys, found, strict=True)}


def speeds(data: ReportData) -> tuple[dict[str, Change], Mapping[str, Any] | None]:
    """Tokens a second by phase, and the record that they are of."""
    measured = next((one["speed"] for one in reversed(data.record.evaluations) if "speed" in one), None)
    pair = measured or {"dense": {}, "model": {}}
    return {phase: Change(pair["dense"].get(phase), pair["model"].get(phase)) for phase in PHASES}, measured


def busy(data: ReportData) -> float | None:
    """The factor by which turns of the speeds differ, where that is too much to compare them."""
    _, measured = speeds(data)
    worst = 1.0 if measured is None else max(measured[key]["spread"] for key in ("dense", "model"))
    return worst if worst > BUSY else None


def sample(data: ReportData) -> tuple[str, str, str] | None:
    """A prompt, and how the dense model and this one go on; the newest."""
    if data.samples:
        return data.samples[0]
    for one in reversed(data.record.evaluations):
        if "sample" in one:
            return one["sample"]["prompt"], one["sample"]["dense"], one["sample"]["model"]
    return None
