"""The largest removed fraction at which a rising quantity stays within a limit, in a stated number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

STEP = 0.001  # fractions are multiples of it, so that a person can write down what was found (**choice**)
_FIRST = 0.2
_POWER = 1.5  # the loss of quality grows about like this power of the removed fraction (**choice**; SmolLM2: 1.3 to 2)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        remove: the largest fraction that was tried and held; 0.0 where none did.
        tried: every fraction and the increase measured there, in the order in which they were tried.
        fails: the least fraction that was tried and did not hold; None where all held.
    """

    remove: float
    tried: tuple[tuple[float, float], ...]
    fails: float | None

    @property
    def increase(self) -> float:
        """Measured at `remove`; 0.0 for the dense model."""
        return dict(self.tried).get(self.remove, 0.0)


def largest_within(
    increase: Callable[[float], float],
    limit: float,
    *,
    evaluations: int,
    most: float,
    first: float | None = None,
    step: float = STEP,
    go_on: Callable[[], bool] = lambda: True,
) -> Found:
    """Bracket, then narrow: the next fraction is where a power law through what was measured meets the limit.

    Args:
        increase: measured at a fraction; about rising, and 0 at 0.
        limit: the largest that holds, above 0.
        evaluations: the most calls of `increase`.
        most: the largest fraction that may be tried.
        first: where to begin; None begins at `limit` itself, 10 % removed for 10 % more, and at most at 20 %.
        step: fractions are multiples of it; the search ends when no fraction lies between the last that holds and the
            first that does not.
        go_on: asked before every evaluation but the first; the search ends where it says no.

    An increase that is not rising everywhere still gives a fraction that was measured to hold.
    """
    last = math.floor(round(most / step, 6))
    low, high = 0, last + 1
    values: dict[int, float] = {0: 0.0}
    tried: list[tuple[float, float]] = []
    at = min(max(round((first or min(limit, _FIRST)) / step), 1), last)
    while len(tried) < evaluations and high - low > 1 and (not tried or go_on()):
        value = increase(_fraction(at, step))
        tried.append((_fraction(at, step), value))
        values[at] = value
        if value <= limit:
            low = at
        else:
            high = at
        at = _next(low, high, values, limit)
    failed = _fraction(high, step) if high <= last else None
    return Found(_fraction(low, step), tuple(tried), failed)


def _next(low: int, high: int, values: dict[int, float], limit: float) -> int:
    """The next fraction to try, in steps, between `low` and `high`."""
    if high not in values:  # not bracketed yet: further, but not by more than a factor of 2
        wanted = low * (limit / values[low]) ** (1 / _POWER) if values[low] > 0 else 2 * low
        wanted = min(max(wanted, 1.1 * low), 2 * low)
    elif values[low] <= 0 or low == 0:
        wanted = high * (limit / values[high]) ** (1 / _POWER)
    else:
        power = math.log(values[high] / values[low]) / math.log(high / low)
        wanted = low * (limit / values[low]) ** (1 / power) if power > 0 else (low + high) / 2
    # Away from both ends, so that every evaluation takes a tenth off the bracket at least.
    edge = (high - low) / 10
    wanted = min(max(wanted, low + edge), high - edge)
    return min(max(math.floor(wanted), low + 1), high - 1)


def _fraction(steps: int, step: float) -> float:
    return round(steps * step, 6)


def least_within(amount: Callable[[float], int], limit: int, *, most: float, step: float) -> float | None:
    """The least multiple of `step` at which a falling amount is at most `limit`; None where it is not even at `most`.

    By interpolation and bisection; `amount` falls nearly in a straight line, and is computed, not measured.
    """
    low, high = 0, math.floor(round(most / step, 6))
    above, below = amount(0.0), amount(_fraction(high, step))
    if above <= limit:
        return 0.0
    if below > limit:
        return None
    by_line = True
    while high - low > 1:
        # Where the line through both ends meets the limit, and every other time the middle: steps may be flat.
        share = (above - limit) / (above - below) if by_line and above > below else 0.5
        at = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
        tries = (at, at - 1) if by_line else (at,)  # the line is mostly right, and then the one before it is too little
        for place in tries:
            if not low < place < high:
                continue
            value = amount(_fraction(place, step))
            if value > limit:
                low, above = place, value
            else:
                high, below = place, value
        by_line = not by_line
    return _fraction(high, step)
