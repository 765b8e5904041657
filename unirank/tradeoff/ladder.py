"""Which fractions are measured: a ladder, and a few more where the curve bends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from unirank.errors import InputError

LADDER = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
MORE = 3  # points that are added to a preset's curve at most (**choice**)
_BEND = 0.02  # of the logarithm of the perplexity: how far a straight line may be off (**choice**: 2 % of perplexity)
_STEP = 0.005  # added fractions are multiples of it


def check_ladders(
    remove: Sequence[float] | Mapping[str, Sequence[float]] | None, presets: Sequence[str], more: int
) -> dict[str, tuple[float, ...]]:
    """The fractions of every preset; one that `remove` does not name has the usual ones.

    Raises InputError like `check_ladder`, and for a name that is not among `presets`.
    """
    if not isinstance(remove, Mapping):
        return dict.fromkeys(presets, check_ladder(remove, more))
    for name in remove:
        if name not in presets:
            raise InputError(f"remove has the preset {name!r}, and the curve is of {', '.join(presets)}.")
    return {name: check_ladder(remove.get(name), more) for name in presets}


def check_ladder(remove: Sequence[float] | None, more: int) -> tuple[float, ...]:
    """The fractions, ascending, each once. Raises InputError for what cannot be one, and for `more` below 0."""
    if more < 0:
        raise InputError(f"more = {more} is not legal; it is at least 0.")
    given = LADDER if remove is None else tuple(remove)
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 1:
            raise InputError(f"remove = {one!r} is not legal: it is a fraction, at least 0 and less than 1.")
    if not any(given):
        raise InputError("remove has no fraction above 0; give at least one.")
    return tuple(sorted({float(one) for one in given}))


def next_fraction(perplexities: Mapping[float, float]) -> float | None:
    """Where one more point tells most: the middle of the interval in which a straight line is farthest off.

    Between neighbours of a curve `y(x)`, `y` the logarithm of the perplexity, a straight line is off by about
    `|y''| h² / 8` in the middle of an interval of width `h`. `y''` is the change of the slope to the neighbouring
    intervals over the distance of their middles, the larger of both sides. An interval that is off by less than 0.02 is
    straight, and one whose middle is not a new multiple of 0.005 is not cut. None where nothing is left.

    Args:
        perplexities: measured, by removed fraction, with that of the dense model at 0.
    """
    xs = sorted(perplexities)
    ys = [math.log(perplexities[x]) for x in xs]
    widths = [b - a for a, b in itertools.pairwise(xs)]
    slopes = [(d - c) / h for (c, d), h in zip(itertools.pairwise(ys), widths, strict=True)]
    best: tuple[float, float] | None = None
    for index, (a, h) in enumerate(zip(xs[:-1], widths, strict=True)):
        turns = [
            2 * abs(slopes[index] - slopes[other]) / (h + widths[other])
            for other in (index - 1, index + 1)
            if 0 <= other < len(slopes)
        ]
        off = max(turns, default=0.0) * h * h / 8
        middle = round(round((a + h / 2) / _STEP) * _STEP, 6)
        if off > _BEND and a < middle < a + h and (best is None or off > best[0]):
            best = off, middle
    return None if best is None else best[1]
