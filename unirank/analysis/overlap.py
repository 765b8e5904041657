"""What runs at the same time: matrices of a layer that are solved, layers that are decomposed, written and calibrated.

On a CPU a layer is calibrated, then decomposed by all cores, and written while the next one is calibrated. On a GPU a
layer is decomposed while the next one is calibrated, where half of the memory that is free has room for it, and its
matrices are solved several at a time: an eigensolver is half memory traffic of one matrix, which leaves a GPU idle.
The order of work changes no bit: what is solved together follows from the shapes (see `decompose`), and layers are
written one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch

from unirank.analysis.store import AnalysisStore
from unirank.distributed import rank
from unirank.layerwise.recording import Streams
from unirank.queues import Beside
from unirank.types import CosineStat, Factors, LinearSpec

T = TypeVar("T")
R = TypeVar("R")

THREADS = 4  # matrices that a GPU solves at a time, at most (**choice**)


@dataclass(frozen=True)
class Solvers:
    """Threads that solve parts of a layer, which together take no more than `room` bytes, unless one alone does."""

    threads: Beside
    room: int

    def map(self, solve: Callable[[T], R], parts: Iterable[T], size_of: Callable[[T], int]) -> Iterator[R]:
        """`solve` of each part, in order, begun as there is room; `size_of` gives the bytes of a part's work."""
        running: deque[tuple[int, Future[R]]] = deque()
        used = 0
        for part in parts:
            size = size_of(part)
            while running and (len(running) == self.threads.threads or used + size > self.room):
                done, future = running.popleft()
                yield future.result()
                used -= done
            running.append((size, self.threads.submit(solve, part)))
            used += size
        for _, future in running:
            yield future.result()


@dataclass(frozen=True)
class Shares:
    """How the free memory of a GPU is shared: whether a layer is decomposed `beside` the calibration of the next one,
    and the `room` for the work on the matrices that are solved at a time."""

    beside: bool
    room: int


def shares_of(free: int, linears: Sequence[LinearSpec], work: torch.dtype) -> Shares:
    """Half of `free` bytes is the decomposition's where any layer's has room in it, and the other half calibrates;
    else they take turns, and each has all of it."""
    largest, held = needs_of_decomposition(linears, work)
    beside = largest + held <= free // 2
    return Shares(beside, (free // 2 if beside else free) - held)


def needs_of_decomposition(linears: Sequence[LinearSpec], work: torch.dtype) -> tuple[int, int]:
    """Bytes of the layer with the most: of the work on its largest matrix, and of what is held meanwhile: its moments
    and its factors, those that are written included."""
    layers: dict[int, list[LinearSpec]] = {}
    for spec in linears:
        layers.setdefault(spec.layer, []).append(spec)
    largest = max(work.itemsize * entries_of_work(spec.m, spec.n) for spec in linears)
    moments = max(sum(8 * n * n for n in {spec.n for spec in members}) for members in layers.values())
    factors = max(sum(work.itemsize * spec.k * spec.cost for spec in members) for members in layers.values())
    return largest, moments + 2 * factors


def entries_of_work(m: int, n: int) -> int:
    """Numbers that work on a weight `[M, N]` holds: it and its factors, the square problem and its eigensolver's."""
    return 2 * m * n + 4 * min(m, n) ** 2


@dataclass
class _Layer:
    """A layer behind its calibration."""

    index: int
    cosines: Mapping[str, CosineStat]
    shares: Mapping[str, float]
    entering: Streams | None


class Finishing:
    """Brings calibrated layers into a store, in order. Use as a context; `end` waits for the last one.

    Args:
        beside: whether a layer is decomposed while the caller goes on. One is at most, and another is written.
        report: told the number of layers that are done, whenever there is one more.
    """

    def __init__(
        self, store: AnalysisStore, device: torch.device, *, beside: bool, report: Callable[[int], None]
    ) -> None:
        self._store, self._report = store, report
        self._disk = Beside(device)
        self._beside = Beside(device) if beside else None
        self._solving: tuple[_Layer, Future[dict[str, Factors]]] | None = None
        self._writing: tuple[int, Future[None]] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Finishing:
        self._open.enter_context(self._disk)
        if self._beside is not None:
            self._open.enter_context(self._beside)
        return self

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)  # pyright: ignore[reportArgumentType] - as it came

    def take(
        self,
        index: int,
        cosines: Mapping[str, CosineStat],
        shares: Mapping[str, float],
        entering: Streams | None,
        decompose: Callable[[], dict[str, Factors]],
    ) -> None:
        """The next layer: its cosines, the shares of its experts, what enters the one after it where that is kept,
        and how its factors are made.

        Raises what making and writing this layer and earlier ones raises.
        """
        layer = _Layer(index, cosines, shares, entering)
        if self._beside is None:
            self._write(layer, decompose())
        else:
            self._solved()
            self._solving = layer, self._beside.submit(decompose)

    def end(self) -> None:
        """Every layer is written."""
        self._solved()
        self._written()

    def _solved(self) -> None:
        if self._solving is not None:
            (layer, future), self._solving = self._solving, None
            self._write(layer, future.result())

    def _write(self, layer: _Layer, factors: Mapping[str, Factors]) -> None:
        self._written()
        if rank() == 0:
            given = (layer.index, factors, layer.cosines, layer.entering, layer.shares)
            self._writing = layer.index, self._disk.submit(self._store.write_layer, *given)

    def _written(self) -> None:
        if self._writing is not None:
            (index, future), self._writing = self._writing, None
            future.result()
            self._report(index + 1)
