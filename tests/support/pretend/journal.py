"""What happened on the pretend GPU, in order, with the line of unirank that asked for it."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One thing that happened.

    `kind` is "to device", "to host" (a copy), "read" (a number that the host waits for), "pinned", or the name of a
    call of a stream or an event, such as "wait_event"; `where` is the place in unirank, "FILE:LINE", or "".
    """

    kind: str
    where: str
    detail: str = ""


@dataclass
class Journal:
    """Entries of all threads."""

    entries: list[Entry] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def note(self, kind: str, detail: str = "") -> None:
        entry = Entry(kind, _place(), detail)
        with self._lock:
            self.entries.append(entry)

    def count(self, kind: str, where: str = "") -> int:
        """How many entries of `kind` there are whose place begins with `where`."""
        return sum(entry.kind == kind and entry.where.startswith(where) for entry in self.entries)

    def places(self, kind: str) -> dict[str, int]:
        """Places of one kind, the most frequent first."""
        found: dict[str, int] = {}
        for entry in self.entries:
            if entry.kind == kind:
                found[entry.where] = found.get(entry.where, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        _, found, tail = frame.f_code.co_filename.rpartition("/unirank/")
        if found and "/tests/" not in frame.f_code.co_filename:
            return f"{tail}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
