"""Work beside the caller's on a GPU: queues (CUDA's streams), marks in them (events), page-locked memory, threads.

Three rules keep memory right without `record_stream`. Work in another queue begins behind a mark of the caller's queue.
What it was given is held until its own queue has come to its end. And its result is handed on only then, so that a
later reader finds it whole, in whatever queue, and memory that is let go is in nobody's use any more.

On a CPU there is one queue, the program itself: nothing here waits, and work in threads is plain work in threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Bytes of each of the two page-locked buffers of a thread that copies to the host (**choice**: 2 ms at 16 GB/s).
BUFFER = 1 << 25
_HELD = 2  # tensors whose copies may be on their way out of `PageLocked`


class Calls:
    """What is called of CUDA, all of it: tests put a recorder in its place, or a pretend GPU."""

    def queue(self, device: torch.device) -> Any:
        """A new queue of `device`."""
        return torch.cuda.Stream(device)

    def current(self, device: torch.device) -> Any:
        """The queue of `device` that this thread is at work in."""
        return torch.cuda.current_stream(device)

    def use(self, queue: Any) -> AbstractContextManager[Any]:
        """This thread works in `queue` inside, and on its device."""
        return torch.cuda.stream(queue)

    def mark(self, queue: Any) -> Any:
        """A mark behind all that `queue` holds now."""
        mark = torch.cuda.Event(blocking=True)  # who settles it sleeps: a core is worth more than some microseconds
        mark.record(queue)
        return mark

    def wait(self, queue: Any, mark: Any) -> None:
        """What comes into `queue` from now on runs when `mark` is reached; the caller goes on at once."""
        queue.wait_event(mark)

    def settle(self, mark: Any) -> None:
        """The caller goes on when `mark` is reached."""
        mark.synchronize()

    def page_locked(self, size: int) -> torch.Tensor:
        """`size` bytes of the host's memory, uint8, that the GPU copies to and from by itself."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def free(self, device: torch.device) -> int:
        """Bytes of `device` that can be had, those that torch keeps for its next tensors included."""
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + max(0, unused)


CALLS = Calls()


def has_queues(device: torch.device) -> bool:
    """Whether work of `device` runs in queues, beside the program that gives it."""
    return device.type == "cuda"


class Beside:
    """Threads at work beside the caller's; on a GPU each in a queue of its own. Use as a context.

    A thread, its queue, and what libraries keep for a thread (cuSOLVER's handle) last as long as the context.
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        self.threads = threads
        self._device = device
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)

    def submit(self, work: Callable[P, R], /, *args: P.args, **more: P.kwargs) -> Future[R]:
        """`work(*args, **more)`, behind all that the caller's queue holds now.

        The future is done when the GPU is; until then what was given is held.
        """
        mark = CALLS.mark(CALLS.current(self._device)) if has_queues(self._device) else None
        return self._pool.submit(self._run, mark, lambda: work(*args, **more))

    def _run(self, mark: Any, work: Callable[[], R]) -> R:
        if mark is None:
            return work()
        if not hasattr(self._own, "queue"):
            self._own.queue = CALLS.queue(self._device)
        CALLS.wait(self._own.queue, mark)
        with CALLS.use(self._own.queue):
            try:
                return work()
            finally:
                CALLS.settle(CALLS.mark(self._own.queue))


_buffers = threading.local()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU, contiguous; as it is where it is that already.

    From a GPU it comes behind what the caller's current queue holds, piece by piece through two page-locked buffers of
    `BUFFER` bytes: one is filled while the other is emptied, and no more memory is locked than these.
    """
    tensor = tensor.detach()
    if not has_queues(tensor.device) or tensor.numel() == 0:
        return tensor.to("cpu").contiguous()
    result = torch.empty(tensor.shape, dtype=tensor.dtype)
    source, target = (one.view(-1).view(torch.uint8) for one in (tensor.contiguous(), result))
    if not hasattr(_buffers, "pair"):
        _buffers.pair = CALLS.page_locked(BUFFER), CALLS.page_locked(BUFFER)
    queue = CALLS.current(tensor.device)
    moving: deque[tuple[Any, torch.Tensor, torch.Tensor]] = deque()
    for index, (piece, place) in enumerate(zip(source.split(BUFFER), target.split(BUFFER), strict=True)):
        if len(moving) == len(_buffers.pair):
            _arrived(*moving.popleft())
        buffer = _buffers.pair[index % len(_buffers.pair)][: len(piece)]
        buffer.copy_(piece, non_blocking=True)
        moving.append((CALLS.mark(queue), buffer, place))
    while moving:
        _arrived(*moving.popleft())
    return result


def _arrived(mark: Any, buffer: torch.Tensor, place: torch.Tensor) -> None:
    CALLS.settle(mark)
    place.copy_(buffer)


class PageLocked:
    """Tensors of a GPU that are kept in page-locked memory of the host. Copies run beside the GPU's work, in order.

    torch keeps page-locked memory in powers of two, so up to twice the bytes are locked.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue = CALLS.queue(device)
        self._leaving: deque[tuple[Any, torch.Tensor]] = deque()

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in the host's memory, which `fetch` may be given at once, and others after `settle`."""
        copy = CALLS.page_locked(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        self._follow()
        with CALLS.use(self._queue):
            copy.copy_(tensor, non_blocking=True)
            self._leaving.append((CALLS.mark(self._queue), tensor))  # not to be let go before
        while len(self._leaving) > _HELD:
            CALLS.settle(self._leaving.popleft()[0])
        return copy

    def fetch(self, kept: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to bring back what `keep` gave; call the result for the tensor, where it is needed."""
        # Memory for it may be that of an earlier one, which the caller's queue reads up to this mark and no further.
        self._follow()
        with CALLS.use(self._queue):
            tensor = kept.to(self._device, non_blocking=True)
            mark = CALLS.mark(self._queue)

        def arrived() -> torch.Tensor:
            CALLS.wait(CALLS.current(self._device), mark)
            return tensor

        return arrived

    def settle(self) -> None:
        """All copies to the host are made."""
        while self._leaving:
            CALLS.settle(self._leaving.popleft()[0])

    def _follow(self) -> None:
        CALLS.wait(self._queue, CALLS.mark(CALLS.current(self._device)))
