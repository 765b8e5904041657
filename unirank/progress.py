"""Progress reports from long work: library code calls a plain function, the command line draws bars from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class OnProgress(Protocol):
    """`stage` names the work; `done` of `total` steps are finished. `done` may start above 0 when work resumes."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """The default: report nothing."""


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
