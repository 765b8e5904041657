"""Progress reports from long work: library code calls a plain function; `unirank.display` draws from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class OnProgress(Protocol):
    """`stage` names the work; `done` of `total` steps are finished. `done` may start above 0 when work resumes."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


# What a public function takes: None draws in terminals and notebooks, True everywhere, False nowhere; or who is told.
Progress = OnProgress | bool | None


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Stage:
    """Work that will be reported, announced before it begins.

    Attributes:
        name: as it will be reported.
        work: what all of it costs, in multiplications and additions of a forward pass (`unirank.costs`).
        parts: where steps cost differently: how the steps and the work are shared out, in order, as pairs
            `(share of the steps, share of the work)`; each sums to 1. Empty: every step costs alike.
        typical: whether its speed says something about that of other stages; reading and writing files does not.
    """

    name: str
    work: float
    parts: tuple[tuple[float, float], ...] = ()
    typical: bool = True

    def share(self, done: int, total: int) -> float:
        """Of the work that is finished after `done` of `total` steps, in [0, 1]."""
        left = min(1.0, done / total) if total > 0 else 1.0
        if not self.parts:
            return left
        share = 0.0
        for steps, work in self.parts:
            if left <= steps:
                return min(1.0, share + (work * left / steps if steps > 0 else 0.0))
            left, share = left - steps, share + work
        return 1.0


def expect(progress: OnProgress, stages: Sequence[Stage]) -> None:
    """Announce stages to a `progress` that understands it, one with a method `expect`; others are told nothing.

    A stage that was announced before, by its name, takes the new numbers. New ones come behind the stage that runs; so
    a job announces all it knows, and its parts announce themselves again, or what only they know.
    """
    announce = getattr(progress, "expect", None)
    if announce is not None:
        announce(stages)


class Stopwatch:
    """Seconds since the last look, added up by stage in `seconds`.

    Args:
        settle: is called before each look; a GPU's queue, for one, must be empty.
    """

    def __init__(self, settle: Callable[[], object] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._settle = settle
        self._last = time.perf_counter()

    def lap(self, stage: str | None = None) -> float:
        """Seconds since the last lap, which also count for `stage`."""
        if self._settle is not None:
            self._settle()
        before, self._last = self._last, time.perf_counter()
        spent = self._last - before
        if stage is not None:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        return spent


def gib(size: int) -> str:
    """Bytes as GiB, for people."""
    return f"{size / 2**30:.2f} GiB"
