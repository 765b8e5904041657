"""Who waits for whom: stands for the calls of `unirank.queues`, and finds reads and writes that nothing orders.

Each queue, and the program, has a clock of what it knows to be done of every other (vector clocks). A mark is a clock,
to wait is to learn it. Two uses of a tensor, one of them a write, must know of each other.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from unirank import queues

HOST, DEFAULT = "program", "queue 0"


class Order(queues.Calls):
    """Runs everything at once, in the order of the program, and remembers what a GPU would have been free to do.

    Attributes:
        races: what was used by two without an order.
        locked: bytes of page-locked memory that were asked for.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.locked = 0
        self._clocks: dict[str, Counter[str]] = {}
        self._uses: dict[Any, list[tuple[str, int, bool]]] = {}
        self._current = threading.local()
        self._made = 0

    # -- the calls ----------------------------------------------------------------------------------------------------

    def queue(self, device: torch.device) -> Any:
        self._made += 1
        return f"queue {self._made}"

    def current(self, device: torch.device | None = None) -> Any:
        return getattr(self._current, "queue", DEFAULT)

    @contextmanager
    def use(self, queue: Any) -> Iterator[None]:
        before, self._current.queue = self.current(), queue
        try:
            yield
        finally:
            self._current.queue = before

    def mark(self, queue: Any) -> Any:
        return Counter(self._clock(queue))

    def wait(self, queue: Any, mark: Any) -> None:
        self._clocks[queue] = self._clock(queue) | mark

    def settle(self, mark: Any) -> None:
        self._clocks[HOST] = self._clock(HOST) | mark

    def page_locked(self, size: int) -> torch.Tensor:
        self.locked += size
        return torch.empty(size, dtype=torch.uint8)

    def free(self, device: torch.device) -> int:
        return 1 << 40

    # -- what is used -------------------------------------------------------------------------------------------------

    def read(self, what: Any, *, by: str | None = None) -> None:
        """`what` is read in the current queue, or `by` the program."""
        self._use(what, by or self.current(), writes=False)

    def write(self, what: Any, *, by: str | None = None) -> None:
        self._use(what, by or self.current(), writes=True)

    def _clock(self, who: str) -> Counter[str]:
        return self._clocks.setdefault(who, Counter())

    def _use(self, what: Any, who: str, *, writes: bool) -> None:
        clock = self._clocks[who] = self._clock(who) | self._clock(HOST)  # nothing begins before it is asked for
        for other, time, wrote in self._uses.get(what, []):
            if (writes or wrote) and clock[other] < time:
                self.races.append(f"{what}: {other} and {who}")
        clock[who] += 1
        self._uses.setdefault(what, []).append((who, clock[who], writes))


def _key(tensor: torch.Tensor) -> int:
    return getattr(tensor, "raw", tensor).data_ptr()


@contextmanager
def watched(order: Order, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`order` stands for the calls, and sees by address what `copy_` and `to` read and write. Tensors stay alive."""
    copy, to, alive = torch.Tensor.copy_, torch.Tensor.to, []

    def used(source: torch.Tensor, target: torch.Tensor, waits: bool) -> None:
        alive.extend((source, target))
        on_host = not source.is_cuda and not target.is_cuda
        order.read(_key(source), by=HOST if on_host else None)
        order.write(_key(target), by=HOST if on_host else None)
        if waits and not on_host:
            order.settle(order.mark(order.current()))

    def watched_copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        used(source, target, not non_blocking)
        return copy(target, source)

    def watched_to(source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = to(source, *args, **kwargs)
        if result is not source:
            used(source, result, not kwargs.get("non_blocking", False))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(queues, "CALLS", order)
        patch.setattr(torch.Tensor, "copy_", watched_copy)
        patch.setattr(torch.Tensor, "to", watched_to)
        yield
