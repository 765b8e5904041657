"""The one display of a job: what it says of stages and time left, and where it draws."""

from __future__ import annotations

import io
import math
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from unirank import display as displays
from unirank.display import Lines, Terminal, display, duration, shows_progress, told
from unirank.errors import InputError
from unirank.estimate import Estimate
from unirank.progress import Progress, Stage, expect, silent


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def rise(seed: int, spread: float) -> float:
    """A random job whose stages cost up to `spread` times more or less than planned, and every step a tenth.

    The most that elapsed and left together rise over their least, once a tenth of the job is done.
    """
    draw = random.Random(seed)
    clock = Clock()
    estimate = Estimate(clock)
    stages = [Stage(f"s{i}", draw.choice([0.05, 0.2, 1, 1, 2, 5])) for i in range(draw.randint(2, 7))]
    real = [stage.work * spread ** draw.uniform(-1, 1) for stage in stages]
    estimate.expect(stages)
    scale = draw.choice([10, 100, 1000]) / sum(real)
    start, whole = clock.now, sum(real) * scale
    least, worst = math.inf, 1.0
    for stage, cost in zip(stages, real, strict=True):
        steps = draw.choice([1, 5, 30, 210])
        estimate.report(stage.name, 0, steps)
        for step in range(1, steps + 1):
            seconds = cost * scale / steps * 1.1 ** draw.uniform(-1, 1)
            looks = 1 + int(100 * seconds / whole)
            for _ in range(looks):
                clock.now += seconds / looks
                look = estimate.look()
                if look.left is not None and clock.now - start > whole / 10:
                    least = min(least, look.elapsed + look.left)
                    worst = max(worst, (look.elapsed + look.left) / least)
            estimate.report(stage.name, step, steps)
    look = estimate.look()
    assert (look.share, look.left) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    return worst


def test_the_time_left_rises_by_a_fifth_at_most_where_costs_are_known_to_a_tenth() -> None:
    assert max(rise(seed, 1.1) for seed in range(60)) <= 1.2


def test_and_mostly_where_costs_are_known_to_a_factor_of_two() -> None:
    """No estimate can promise more: a job whose second half takes four times as long is longer than it seemed."""
    worst = sorted(rise(seed, 2.0) for seed in range(60))
    assert worst[len(worst) // 2] <= 1.2
    assert worst[-1] <= 4
    assert sum(value <= 1.2 for value in (rise(seed, 1.2) for seed in range(60))) >= 57


def test_it_is_right_where_the_plan_is_and_says_nothing_before_anything_is_known() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    estimate.expect([Stage("a", 1), Stage("b", 3)])
    assert estimate.look().left is None
    estimate.report("a", 0, 10)
    assert (estimate.look().number, estimate.look().left) == (1, None)
    for step in range(10):
        clock.now += 1
        estimate.report("a", step + 1, 10)
    look = estimate.look()
    assert (look.number, look.count, look.share, look.elapsed) == (1, 2, 0.25, 10)
    assert look.left is not None
    assert 30 <= look.left <= 1.2 * 30 + 1e-6
    estimate.report("b", 0, 3)
    clock.now += 10
    estimate.report("b", 1, 3)
    clock.now += 10
    estimate.report("b", 2, 3)
    look = estimate.look()
    assert (look.number, look.share) == (2, pytest.approx(0.75))
    assert look.left == pytest.approx(10, rel=0.25)


def test_what_an_earlier_run_finished_is_no_speed() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    estimate.expect([Stage("a", 1)])
    estimate.report("a", 80, 100)
    assert estimate.look().share == pytest.approx(0.8)
    for step in range(81, 91):
        clock.now += 2
        estimate.report("a", step, 100)
    assert estimate.look().left == pytest.approx(20, rel=0.05)


def test_a_stage_that_never_begins_is_passed_over_and_one_that_nobody_announced_joins() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    estimate.expect([Stage("a", 1), Stage("kept by the store", 50), Stage("c", 1)])
    for stage in ("a", "surprise", "c"):
        estimate.report(stage, 0, 2)
        clock.now += 5
        estimate.report(stage, 1, 2)
        seen = estimate.look()
        clock.now += 5
        estimate.report(stage, 2, 2)
    assert (seen.number, seen.count, seen.stage) == (3, 3, "c")
    assert seen.left == pytest.approx(5, rel=0.3)
    assert estimate.look().share == pytest.approx(1)


def test_steps_that_cost_differently_are_weighed() -> None:
    stage = Stage("gradients", 10, parts=((0.5, 0.2), (0.5, 0.8)))
    assert [stage.share(done, 4) for done in range(5)] == pytest.approx([0, 0.1, 0.2, 0.6, 1])
    assert Stage("x", 1).share(0, 0) == 1  # nothing to do
    clock = Clock()
    estimate = Estimate(clock)
    estimate.expect([stage])
    for step, seconds in enumerate((1, 1, 4, 4)):
        estimate.report("gradients", step, 4)
        clock.now += seconds
        if step:
            left = estimate.look().left
            assert left == pytest.approx((9, 8, 4, 0)[step], abs=1.1)


def test_a_stage_takes_the_newer_announcement() -> None:
    estimate = Estimate(Clock())
    expect(estimate.report, [Stage("a", 1)])  # a function without `expect` is told nothing
    estimate.expect([Stage("a", 1), Stage("b", 1)])
    estimate.expect([Stage("b", 3), Stage("c", 1)])
    estimate.report("a", 1, 1)
    assert (estimate.look().count, estimate.look().share) == (3, pytest.approx(0.2))


def test_what_is_announced_while_a_stage_runs_comes_behind_it() -> None:
    estimate = Estimate(Clock())
    estimate.expect([Stage("load", 1), Stage("save", 1)])
    estimate.report("load", 1, 1)
    estimate.expect([Stage("left", 1), Stage("right", 1)])
    seen = []
    for stage in ("left", "right", "save"):
        estimate.report(stage, 0, 1)
        seen.append((estimate.look().number, estimate.look().count))
        estimate.report(stage, 1, 1)
    assert seen == [(2, 4), (3, 4), (4, 4)]


def drawn(drawing: Terminal, console: Console) -> str:
    with console.capture() as captured:
        console.print(drawing._drawn())
    return captured.get()


def test_a_terminal_shows_stage_share_and_both_times() -> None:
    clock = Clock()
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    drawing = Terminal(console, clock)
    with drawing as progress:
        expect(progress, [Stage("load", 1), Stage("measure each linear", 3)])
        progress("load", 0, 1)
        clock.now += 20
        progress("load", 1, 1)
        progress("measure each linear", 0, 420)
        clock.now += 30
        progress("measure each linear", 210, 420)
        shown = drawn(drawing, console)
        assert "stage 2 of 2: measure each linear, 210 of 420" in shown
        assert "62%" in shown
        assert "0:00:50 elapsed" in shown
        assert "left" in shown
        assert len(shown.splitlines()) == 2  # also at 80 columns
    assert "done in 0:00:50" in stream.getvalue().splitlines()[-2]


def test_what_took_no_time_leaves_nothing_behind() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    with Terminal(console, Clock()) as progress:
        progress("a", 1, 1)
    assert stream.getvalue().endswith("\x1b[2K")  # the line is wiped out


def test_a_terminal_says_where_it_was_stopped() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)

    def interrupted() -> None:
        with Terminal(console, Clock()) as progress:
            progress("heal", 3, 9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "stopped after 0:00:00 in stage 1 of 1: heal, 3 of 9" in stream.getvalue()


def test_nothing_is_drawn_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    for choice in (None, False):
        with display(choice) as progress:
            assert progress is silent
            progress("a", 0, 1)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(InputError, match="progress = 3 is not legal"), display(3):  # pyright: ignore[reportArgumentType]
        pass


def test_true_writes_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with display(True) as progress, display(True) as inner:
        assert inner is silent  # one display
        progress("a", 0, 2)
        progress("a", 1, 2)
        progress("b", 0, 1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["stage 1 of 1: a", "stage 2 of 2: b"]


def test_a_notebook_has_one_line_that_is_written_again(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    clock = Clock()
    monkeypatch.setattr(displays, "Lines", lambda stream, again=False: Lines(stream, again=again, clock=clock))
    with display(None) as progress:
        for step in range(3):
            progress("a", step, 2)
            clock.now += 1
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\r") == 3
    assert out.rstrip().endswith("stage 1 of 1: a, 2 of 2, 100%, 0:00:02 elapsed, 0:00:00 left")
    assert out.endswith("\n")
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    with display(None) as progress:
        assert progress is silent


def test_under_torchrun_only_the_first_process_draws(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, drawn in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with display(True) as progress:
            progress("a", 0, 1)
        assert bool(capsys.readouterr().err) == drawn


def test_a_function_that_shows_progress_takes_all_four(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    @shows_progress
    def work(count: int, *, progress: Progress = None) -> int:
        """Work."""
        told(progress)("work", count, 2)
        return count

    def keep(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    assert (work(1), work(1, progress=False), work(1, progress=keep)) == (1, 1, 1)
    assert seen == [("work", 1, 2)]
    assert capsys.readouterr().err == ""
    assert work(1, progress=True) == 1
    assert "stage 1 of 1: work, 1 of 2" in capsys.readouterr().err
    assert work.__doc__ == "Work."


def test_a_duration_has_hours_minutes_and_seconds() -> None:
    assert [duration(s) for s in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]


def test_a_log_is_told_of_long_work_alone() -> None:
    clock, out = Clock(), io.StringIO()
    with Lines(out, after=120.0, clock=clock) as lines:
        lines("calibrate", 0, 10)
        clock.now += 100
        lines("calibrate", 5, 10)
        assert out.getvalue() == ""
        clock.now += 30
        lines("calibrate", 6, 10)
        for _ in range(3):
            lines("calibrate", 10, 10)
    told = out.getvalue().splitlines()
    assert [line.split(", ")[:2] for line in told] == [
        ["stage 1 of 1: calibrate", "6 of 10"],
        ["stage 1 of 1: calibrate", "10 of 10"],
    ]
