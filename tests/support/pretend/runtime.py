"""What stands for `torch.cuda` while there is a pretend GPU: its figures, and streams and events that are recorded."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.pretend.journal import Journal
from tests.support.pretend.tensor import DEVICE

NAME = "Pretend GPU"
TOTAL = 80 << 30
FREE = 64 << 30


class PretendEvent:
    """Recorded, never waited for: what came before it has been done."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def record(self, stream: Any = None) -> None:
        self._journal.note("record", _name(stream))

    def wait(self, stream: Any = None) -> None:
        self._journal.note("wait_event", _name(stream))

    def synchronize(self) -> None:
        self._journal.note("event synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class PretendStream:
    """A stream in name: everything runs at once, in the order of the program."""

    made = 0

    def __init__(self, journal: Journal, *, default: bool = False) -> None:
        self._journal = journal
        self.device = DEVICE
        self.device_index = 0
        PretendStream.made += not default
        self.stream_id = 0 if default else PretendStream.made
        self.cuda_stream = self.stream_id

    def wait_stream(self, other: Any) -> None:
        self._journal.note("wait_stream", f"{_name(self)} for {_name(other)}")

    def wait_event(self, event: Any) -> None:
        self._journal.note("wait_event", _name(self))

    def record_event(self, event: Any = None) -> PretendEvent:
        event = event or PretendEvent(self._journal)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._journal.note("stream synchronize", _name(self))

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretendStream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return self.stream_id


def _name(stream: Any) -> str:
    return "current" if stream is None else f"stream {stream.stream_id}"


class _Using:
    """`torch.cuda.stream(stream)`."""

    def __init__(self, current: list[PretendStream], stream: PretendStream | None, journal: Journal) -> None:
        self._current, self._stream, self._journal = current, stream, journal

    def __enter__(self) -> None:
        if self._stream is not None:
            self._journal.note("enter stream", _name(self._stream))
            self._current.append(self._stream)

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._current.pop()


class _Device:
    """`torch.cuda.device(...)` with one device."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def replacements(journal: Journal, *, free: int = FREE, bf16: bool = True) -> dict[str, Any]:
    """Names in `torch.cuda` and what they are while there is a pretend GPU.

    Args:
        free: bytes that `mem_get_info` says are free, of 80 GiB.
        bf16: what `is_bf16_supported` says.
    """
    local = threading.local()
    default = PretendStream(journal, default=True)

    def current() -> list[PretendStream]:
        if not hasattr(local, "streams"):
            local.streams = [default]
        return local.streams

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def synchronize(*_: Any) -> None:
        journal.note("synchronize")

    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=TOTAL, multi_processor_count=132, L2_cache_size=50 << 20
    )
    return {
        "_lazy_init": nothing,  # torch's C++ calls it by this name before it makes the first tensor of the device
        "_initialized": True,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": _Device,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: bf16,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (free, TOTAL),
        "memory_allocated": lambda *_: 1 << 30,
        "memory_reserved": lambda *_: 1 << 30,
        "max_memory_allocated": lambda *_: 1 << 30,
        "max_memory_reserved": lambda *_: 1 << 30,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "synchronize": synchronize,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state": nothing,
        "set_rng_state_all": nothing,
        "Stream": lambda *_, **__: PretendStream(journal),
        "Event": lambda *_, **__: PretendEvent(journal),
        "stream": lambda stream: _Using(current(), stream, journal),
        "current_stream": lambda *_: current()[-1],
        "default_stream": lambda *_: default,
        "set_stream": lambda stream: current().append(stream),
    }
