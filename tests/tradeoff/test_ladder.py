"""Which fractions are measured."""

from __future__ import annotations

import math

import pytest

from unirank import InputError
from unirank.tradeoff.ladder import LADDER, check_ladder, check_ladders, next_fraction


def test_the_ladder_is_in_order_and_every_fraction_once() -> None:
    assert check_ladder(None, 3) == LADDER
    assert check_ladder([0.4, 0.1, 0.4], 0) == (0.1, 0.4)
    for wrong in ([1.0], [-0.1], [True], ["a"], [], [0.0]):
        with pytest.raises(InputError, match="remove"):
            check_ladder(wrong, 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="more = -1"):
        check_ladder(None, -1)


def test_every_preset_has_its_ladder() -> None:
    names = ("unirank", "fast")
    assert check_ladders(None, names, 0) == {"unirank": LADDER, "fast": LADDER}
    assert check_ladders((0.2,), names, 0) == {"unirank": (0.2,), "fast": (0.2,)}
    assert check_ladders({"fast": (0.4, 0.2)}, names, 0) == {"unirank": LADDER, "fast": (0.2, 0.4)}
    with pytest.raises(InputError, match="the preset 'best', and the curve is of unirank, fast"):
        check_ladders({"best": (0.2,)}, names, 0)


def test_a_straight_line_needs_no_more_points() -> None:
    assert next_fraction({x: 12 * math.exp(3 * x) for x in LADDER}) is None
    assert next_fraction({0.0: 12.0, 0.3: 20.0}) is None


def test_the_next_point_is_where_the_curve_bends() -> None:
    """Flat up to 0.4, steep behind it: the bend is between 0.3 and 0.5."""
    curve = {x: 12 * math.exp(max(0.0, x - 0.4) * 10) for x in LADDER}
    found = []
    while (at := next_fraction(curve)) is not None and len(found) < 3:
        assert at not in curve
        found.append(at)
        curve[at] = 12 * math.exp(max(0.0, at - 0.4) * 10)
    assert found
    assert all(0.3 < at < 0.6 for at in found)


def test_points_end_where_they_would_be_too_near() -> None:
    curve = {0.0: 12.0, 0.005: 12.0, 0.01: 100.0}
    assert next_fraction(curve) is None
