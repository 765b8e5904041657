"""Progress reports from long work: library code calls a plain function, the command line draws bars from it."""

from __future__ import annotations

from typing import Protocol


class OnProgress(Protocol):
    """`stage` names the work; `done` of `total` steps are finished. `done` may start above 0 when work resumes."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """The default: report nothing."""


def gib(size: int) -> str:
    """Bytes as GiB, for people."""
    return f"{size / 2**30:.2f} GiB"
