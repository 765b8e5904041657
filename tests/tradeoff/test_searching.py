"""The search for the largest fraction within a limit: few evaluations, and what it ends at was measured to hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unirank.tradeoff.searching import largest_within, least_within


@given(
    scale=st.floats(0.2, 50),
    power=st.floats(0.8, 3),
    limit=st.floats(0.005, 1),
    evaluations=st.integers(1, 8),
    first=st.none() | st.floats(0.01, 0.9),
)
def test_a_rising_increase(scale: float, power: float, limit: float, evaluations: int, first: float | None) -> None:
    asked: list[float] = []

    def increase(remove: float) -> float:
        asked.append(remove)
        return scale * remove**power

    found = largest_within(increase, limit, evaluations=evaluations, most=0.9, first=first)
    true = min((limit / scale) ** (1 / power), 0.9)
    assert [at for at, _ in found.tried] == asked
    assert len(set(asked)) == len(asked) <= evaluations
    assert found.remove <= true + 1e-9
    assert found.remove == 0 or (found.remove in asked and found.increase <= limit)
    if found.fails is not None:
        assert found.fails in asked
        assert found.fails > true - 1e-9
    begun = first or min(limit, 0.2)
    if evaluations == 8 and true >= 0.002 and 0.25 <= true / begun <= 4:  # each step is by a factor of 2 at most
        assert true - found.remove < max(0.0021, 0.03 * true)


def test_noise_still_ends_at_a_fraction_that_held() -> None:
    def increase(remove: float) -> float:
        return remove + 0.03 * math.sin(200 * remove)

    found = largest_within(increase, 0.1, evaluations=12, most=0.9)
    assert found.remove > 0.05
    assert dict(found.tried)[found.remove] <= 0.1


@pytest.mark.parametrize("more", [0, 1, 3])
def test_a_search_ends_where_it_may_not_go_on(more: int) -> None:
    answers = iter([True] * more + [False])
    found = largest_within(lambda remove: remove, 0.123, evaluations=8, most=0.9, go_on=lambda: next(answers))
    assert len(found.tried) == 1 + more  # the first is always made


def test_an_increase_below_zero_goes_on() -> None:
    found = largest_within(lambda remove: -0.01 if remove < 0.3 else 1.0, 0.1, evaluations=12, most=0.9)
    assert found.remove == pytest.approx(0.299, abs=0.03)
    assert found.fails is not None
    assert found.fails >= 0.3


@given(
    slope=st.integers(1_000, 10**9), bend=st.floats(0, 0.5), limit=st.floats(0, 1.2), step=st.sampled_from([1e-5, 1e-3])
)
def test_the_least_fraction_is_exact(slope: int, bend: float, limit: float, step: float) -> None:
    def amount(remove: float) -> int:
        calls.append(remove)
        return slope - int(slope * ((1 - bend) * remove + bend * remove**2))

    calls: list[float] = []
    asked = int(limit * slope)
    found = least_within(amount, asked, most=0.95, step=step)
    if found is None:
        assert amount(0.95) > asked
        return
    assert amount(found) <= asked
    assert found == 0 or amount(round(found - step, 6)) > asked
    assert len(calls) < 60
