"""How much of a job is done and how long the rest will take: arithmetic over what was announced and what was reported.

The unit of work is that of `Stage.work`; nothing here knows what it is. Seconds a unit come from what has run so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unirank.progress import Stage

# **Choices.** A stage that has not begun is taken to be this much slower than those that ran: costs are known to a
# fifth or so, and a job that ends early is the better surprise.
_CAUTION = 1.2
# What ran before counts as so much of a stage's own work, until its own speed is known.
_PRIOR = 0.15
# No time is told before so much of the job, or of a stage that nobody announced, is done.
_KNOWN = 0.02
# The time that is told follows the estimate with this time constant, a share of the whole job's time.
_SMOOTH = 0.05
_NEAR = 1.2
# A step that takes longer than it should counts as nearly done, not as done.
_NEARLY = 0.9


@dataclass(frozen=True)
class Look:
    """A job at one moment.

    Attributes:
        number, count: of the stage, from 1, and of all but those that were passed over; 0 before the first report.
        stage, done, total: as reported last.
        share: of the work that is done, in [0, 1]; never falls.
        elapsed: seconds.
        left: seconds; None while nothing is known.
    """

    number: int
    count: int
    stage: str
    done: int
    total: int
    share: float
    elapsed: float
    left: float | None


@dataclass
class _Running:
    """A stage, and what was reported of it."""

    stage: Stage
    done: int = 0
    total: int = 0
    jump: int = 1  # steps between the last two reports
    resumed: float = 0.0  # share that was finished when it was first reported
    share: float = 0.0
    seconds: float = 0.0  # up to the last report
    last: float | None = None  # when that was; None: not begun
    over: bool = False  # finished, or passed over
    announced: bool = True

    @property
    def passed_over(self) -> bool:
        return self.over and self.last is None

    @property
    def worked(self) -> float:
        """Units that were done while we looked."""
        return (self.share - self.resumed) * self.stage.work

    @property
    def left(self) -> float:
        """Units."""
        return 0.0 if self.over else (1.0 - self.share) * self.stage.work


class Estimate:
    """Of one job.

    A stage that is reported without having been announced is taken to cost as much as the mean of the others.

    Args:
        clock: seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self._stages: list[_Running] = []
        self._current: _Running | None = None
        self._share = 0.0
        self._told: tuple[float, float] | None = None  # when, and seconds of the whole job

    def expect(self, stages: Sequence[Stage]) -> None:
        """Announce stages, in the order in which they will run; see `unirank.progress.expect`."""
        known = {running.stage.name: running for running in self._stages}
        place = len(self._stages) if self._current is None else self._stages.index(self._current) + 1
        for stage in stages:
            if stage.name in known:
                running = known[stage.name]
                running.stage, running.announced = stage, True
                if running.last is not None:
                    running.share = max(running.resumed, stage.share(running.done, running.total))
                place = max(place, self._stages.index(running) + 1)
            else:
                self._stages.insert(place, _Running(stage))
                place += 1
        self._told = None

    def report(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` steps of `stage` are finished."""
        now = self._clock()
        running = self._find(stage)
        if running is not self._current:
            self._begin(running)
        share = running.stage.share(done, total)
        if running.last is None:
            running.resumed = running.share = share
            if share > 0:
                self._told = None
        else:
            running.seconds += now - running.last
            running.jump = max(1, done - running.done)
            running.share = max(running.share, share)
        running.done, running.total, running.last = done, total, now
        running.over = done >= total

    def look(self) -> Look:
        """The job now."""
        now = self._clock()
        elapsed = now - self._start
        current = self._current
        counted = [running for running in self._stages if not running.passed_over]
        whole = sum(running.stage.work for running in counted)
        left = sum(running.left for running in counted)
        if whole > 0 and current is not None:
            self._share = max(self._share, 1 - left / whole)
        seconds = None if current is None else self._left(current, now)
        if current is None:
            return Look(0, len(counted), "", 0, 0, self._share, elapsed, None)
        return Look(
            counted.index(current) + 1,
            len(counted),
            current.stage.name,
            current.done,
            current.total,
            self._share,
            elapsed,
            None if seconds is None else self._smooth(now, elapsed, seconds),
        )

    def _find(self, name: str) -> _Running:
        for running in self._stages:
            if running.stage.name == name:
                return running
        announced = [running.stage.work for running in self._stages if running.stage.work > 0]
        running = _Running(Stage(name, sum(announced) / len(announced) if announced else 1.0), announced=False)
        place = len(self._stages) if self._current is None else self._stages.index(self._current) + 1
        self._stages.insert(place, running)
        return running

    def _begin(self, running: _Running) -> None:
        """What stands before it is over; if it never began, there was nothing to do."""
        for earlier in self._stages[: self._stages.index(running)]:
            if not earlier.over and earlier.last is None:
                self._told = None
            earlier.over = True
        running.over = False
        if running.last is not None:
            running.last = self._clock()  # it is gone on with; what ran in between is not its time
        self._current = running

    def _speed(self) -> float | None:
        """Seconds a unit of all that ran; None while that is too little."""
        ran = [running for running in self._stages if running.stage.typical and not running.passed_over]
        worked = sum(running.worked for running in ran)
        whole = sum(running.stage.work for running in ran)
        return sum(running.seconds for running in ran) / worked if worked > _KNOWN * whole else None

    def _left(self, current: _Running, now: float) -> float | None:
        """Seconds, not smoothed."""
        general = self._speed()
        others = 0.0
        if current.over or current.worked <= 0:
            own = general
        else:
            before = sum(running.worked for running in self._stages if running is not current and running.stage.typical)
            seconds = sum(r.seconds for r in self._stages if r is not current and r.stage.typical)
            prior = seconds / before if before > 0 else None
            units = 0.0 if prior is None else _PRIOR * current.stage.work
            own = ((prior or 0.0) * units + current.seconds) / (units + current.worked)
        for running in self._stages:
            if running is not current and not running.over:
                if general is None:
                    return None
                others += _CAUTION * general * running.left
        if current.over:
            return others
        if own is None or general is None:
            return None
        assert current.last is not None
        ahead = current.stage.share(current.done + current.jump, current.total) - current.share
        step = own * ahead * current.stage.work  # the time of the step that is under way
        return others + own * current.left - min(now - current.last, _NEARLY * step)

    def _smooth(self, now: float, elapsed: float, left: float) -> float:
        """The time that is told: near an estimate that jumps, but not jumping; never a fifth from it."""
        whole = elapsed + left
        if self._told is not None:
            when, told = self._told
            near = math.exp(-(now - when) / (_SMOOTH * told)) if told > 0 else 0.0
            whole += near * (told - whole)
        self._told = now, whole
        return min(max(whole - elapsed, left / _NEAR), left * _NEAR)
