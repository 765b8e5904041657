"""One display of a whole job: in a terminal two lines that rich draws, in a notebook or a log one line of text."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from unirank.errors import InputError
from unirank.estimate import Estimate, Look
from unirank.progress import OnProgress, Progress, Stage, silent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_REDRAW = 4  # times a second, in a terminal
_LINE_EVERY = 30.0  # seconds between two lines of a log, within a stage
_NOTEBOOK_EVERY = 0.5  # and between two states of the line of a notebook
_WORTH_A_LINE = 2.0  # seconds; what took less leaves nothing behind
_active = threading.local()  # whether this thread draws: what it calls does not draw once more

F = TypeVar("F", bound=Callable[..., Any])


def shows_progress(function: F) -> F:
    """For a function with the keyword `progress: Progress = None`: inside it, that is an `OnProgress` (see `told`)."""

    @functools.wraps(function)
    def shown(*args: Any, progress: Progress = None, **kwargs: Any) -> Any:
        with display(progress) as report:
            return function(*args, progress=report, **kwargs)

    # inspect.signature follows __wrapped__; a check here that the keyword is there would be too late for the reader.
    assert "progress" in inspect.signature(function).parameters
    return cast("F", shown)


def told(progress: Progress) -> OnProgress:
    """Who is told, inside a function that `shows_progress`."""
    return progress if callable(progress) else silent


@contextmanager
def display(progress: Progress, *, console: Console | None = None) -> Iterator[OnProgress]:
    """Who is told meanwhile.

    Args:
        progress: None draws in terminals and notebooks and is silent elsewhere; True also writes lines to stderr where
            neither is; False is silent; a function is told itself. Nothing is drawn inside of what draws already, and
            under torchrun only by process 0.
        console: where a terminal's display goes; None is stderr.

    Raises InputError for anything else.
    """
    if callable(progress):
        yield progress
        return
    if progress is not None and not isinstance(progress, bool):
        raise InputError(f"progress = {progress!r} is not legal; it must be True, False, None or a function.")
    chosen = None
    if progress is not False and not process_number() and not getattr(_active, "drawing", False):
        chosen = _chosen(console, always=progress is True)
    if chosen is None:
        yield silent
        return
    _active.drawing = True
    try:
        with chosen:
            yield chosen
    finally:
        _active.drawing = False


def _chosen(console: Console | None, *, always: bool) -> Display | None:
    errors = cast("IO[str] | None", sys.stderr)  # None in a program without a console
    if console is not None or (errors is not None and errors.isatty()):
        return Terminal(console)
    if _in_notebook():
        return Lines(sys.stdout, again=True)
    return Lines(errors) if always and errors is not None else None


def _in_notebook() -> bool:
    """Whether an IPython with a kernel runs this process; one in a terminal has none."""
    found = sys.modules.get("IPython")
    shell = found.get_ipython() if found is not None else None
    return shell is not None and hasattr(shell, "kernel")


class Display:
    """What every display shares: it is told, and asks an `Estimate` what to draw. An `OnProgress` with `expect`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._estimate = Estimate(clock)
        self._lock = threading.Lock()  # a terminal is drawn by a thread of its own
        self._quiet: Any = None  # transformers' logging, where it had its bars on

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._quieten()
        with self._lock:
            self._estimate.report(stage, done, total)
        self._told()

    def expect(self, stages: Sequence[Stage]) -> None:
        """Announce stages (see `unirank.progress.expect`)."""
        with self._lock:
            self._estimate.expect(stages)

    def look(self) -> Look:
        with self._lock:
            return self._estimate.look()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._quiet is not None:
            self._quiet.enable_progress_bar()

    def _told(self) -> None:
        """Draw, where nobody else does."""

    def _quieten(self) -> None:
        """Bars of transformers would be drawn across ours; it is often imported only while we run."""
        logging = sys.modules.get("transformers.utils.logging")
        if self._quiet is None and logging is not None and logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            self._quiet = logging


class Terminal(Display):
    """Two lines at the bottom of the terminal, which move on by themselves; one line is left at the end."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(clock)
        self._ended = ""
        console = console or Console(stderr=True)
        self._live = Live(get_renderable=self._drawn, console=console, refresh_per_second=_REDRAW)

    def __enter__(self) -> Display:
        self._live.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        look = self.look()
        if look.number:
            took = duration(look.elapsed)
            self._ended = f"done in {took}" if kind is None else f"stopped after {took} in {title(look)}"
        self._live.transient = kind is None and look.elapsed < _WORTH_A_LINE
        self._live.stop()

    def _drawn(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        look = self.look()
        if self._ended:
            return Text(self._ended, style="dim")
        if not look.number:
            return Text("")
        row = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=1.0, completed=look.share, width=30)
        row.add_row(bar, f"{look.share:4.0%}", f"{duration(look.elapsed)} elapsed", left(look))
        return Group(Text(title(look)), row)


class Lines(Display):
    """One line of text: written over itself in a notebook, a new one for a stage and now and then in a log.

    Args:
        again: write over the line.
        after: seconds in which nothing is written: short work has nothing to tell.
    """

    def __init__(
        self,
        stream: IO[str],
        *,
        again: bool = False,
        after: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(clock)
        self._stream, self._again, self._after = stream, again, after
        self._stage, self._when, self._width, self._ended = "", -float("inf"), 0, False

    def _told(self) -> None:
        look = self.look()
        every = _NOTEBOOK_EVERY if self._again else _LINE_EVERY
        if look.elapsed < self._after:
            return
        ends, self._ended = look.share >= 1 and not self._ended, look.share >= 1
        if look.stage != self._stage or look.elapsed - self._when >= every or ends:
            self._stage, self._when = look.stage, look.elapsed
            self._write(f"{title(look)}, {look.share:.0%}, {duration(look.elapsed)} elapsed, {left(look)}")

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if self._again and self._width:
            self._stream.write("\n")
            self._stream.flush()

    def _write(self, line: str) -> None:
        if self._again:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = max(self._width, len(line))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def title(look: Look) -> str:
    """ "stage 2 of 4: measure each linear, 12 of 420"."""
    steps = f", {look.done} of {look.total}" if look.total > 1 else ""
    return f"stage {look.number} of {look.count}: {look.stage}{steps}"


def left(look: Look) -> str:
    """ "0:04:10 left"; what is not known yet is not told."""
    return "time left: not known yet" if look.left is None else f"{duration(look.left)} left"


def duration(seconds: float) -> str:
    """ "1:02:03", hours, minutes and seconds."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole:02d}"


def process_number() -> int | None:
    """This process's number under torchrun, else None. (`unirank.distributed` would import torch.)"""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
