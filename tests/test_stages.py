"""What a job announces is what it reports: the names of its stages, in their order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import unirank
from unirank.costs import Sizes
from unirank.estimate import Estimate
from unirank.progress import Stage
from unirank.recipes import Preset, preset
from unirank.stages import analysis_stages, planning_stages, stages_behind
from unirank.tradeoff.pricing import Prices


class Watching:
    """A progress that understands announcements, and keeps everything."""

    def __init__(self) -> None:
        self.announced: dict[str, Stage] = {}
        self.reported: list[str] = []
        self.unannounced: list[str] = []
        self.ended: dict[str, bool] = {}

    def expect(self, stages: Sequence[Stage]) -> None:
        self.announced |= {stage.name: stage for stage in stages}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.announced:
            self.unannounced.append(stage)
        if stage not in self.reported:
            self.reported.append(stage)
        self.ended[stage] = done == total

    def check(self) -> None:
        assert self.unannounced == []
        assert self.reported == [name for name in self.announced if name in self.reported]
        assert all(self.ended.values())
        assert all(stage.work > 0 for stage in self.announced.values())


HEAL = {"passes": 1, "held_out": 0.3, "distill_steps": 1}


@pytest.mark.filterwarnings("ignore::unirank.errors.UnirankWarning")
@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ({}, ["load", "calibrate and decompose", "truncate"]),
        ({"preset": "fast"}, ["load", "calibrate and decompose", "measure each linear", "refine"]),
        ({"preset": "best"}, ["load", "gradients", "calibrate and decompose", "measure each linear", "refine"]),
        ({"heal": HEAL}, ["load", "calibrate and decompose", "truncate", "heal", "sample", "distill"]),
        ({"allocator": "swift"}, ["load", "calibrate and decompose", "measure allocations", "truncate"]),
        ({"allocator": "ara", "options": {"steps": 1}}, ["load", "calibrate and decompose", "train ranks", "truncate"]),
        (
            {"allocator": "lems", "options": {"depth": 1, "rounds": 1, "swaps": 1, "held_out": 1}},
            [
                *("load", "calibrate and decompose", "measure each linear", "try depth factors"),
                *("measure in plan 1, below", "measure in plan 1, above", "measure in plan 1, compare"),
                *("swap ranks", "truncate"),
            ],
        ),
    ],
)
def test_a_compression_reports_what_it_announced(
    recipe: dict[str, Any], stages: list[str], model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = dict(recipe)
    if "heal" in asked:
        asked["heal"] = unirank.Heal(**asked["heal"])
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=24, batch=2)
    watching = Watching()
    common: dict[str, Any] = {"calibration": calibration, "store": tmp_path / "store", "device": "cpu"}
    unirank.compress(model_dir, 0.4, multiple_of=1, **asked, **common, progress=watching)
    assert watching.reported == stages
    watching.check()


@pytest.mark.filterwarnings("ignore::unirank.errors.UnirankWarning")
def test_so_do_an_analysis_and_a_plan(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=24, batch=2)
    watching = Watching()
    common: dict[str, Any] = {"calibration": calibration, "device": "cpu"}
    store = unirank.analyze(model_dir, tmp_path / "s", preset="best", **common, progress=watching)
    assert watching.reported == ["load", "gradients", "calibrate and decompose"]
    watching.check()
    watching = Watching()
    more: dict[str, Any] = {"against": model_dir, "calibration": str(text_file), "device": "cpu"}
    unirank.plan(store, 0.3, preset="best", **more, progress=watching)
    assert watching.reported == ["load", "measure each linear"]
    watching.check()


@pytest.mark.filterwarnings("ignore::unirank.errors.UnirankWarning")
def test_so_does_a_curve(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Its points cost unlike much, so half of them are not half of the work."""
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=24, batch=2)
    asked: dict[str, Any] = {"remove": (0.1, 0.3), "more": 1, "texts": str(text_file), "window": 24, "limit": 2}
    asked |= {"calibration": calibration, "place": tmp_path / "out", "device": "cpu"}
    one = ["gradients", "calibrate and decompose"]
    two = ["calibrate and decompose, whiten", *(f"{stage}, kfac" for stage in one)]
    for presets, first in ((("unirank", "best"), two), (("best",), one)):  # the second time all of it is there
        watching = Watching()
        unirank.curve(model_dir, presets=presets, **asked, progress=watching)
        assert list(watching.announced) == ["load", *first, "measure each linear", "points"]
        assert watching.unannounced == []
        assert all(watching.ended.values())
        assert {name for name in watching.reported if name != "measure each linear"} == {"load", *first, "points"}
    points = watching.announced["points"]
    assert len(points.parts) == 4  # dense, two fractions, one more
    assert points.share(1, 4) < 0.1
    assert points.share(4, 4) == pytest.approx(1.0)


class Drawn(Watching):
    """One that keeps what a display would have shown."""

    def __init__(self) -> None:
        super().__init__()
        self.estimate = Estimate(time.perf_counter)
        self.shares: dict[str, list[float]] = {}

    def expect(self, stages: Sequence[Stage]) -> None:
        super().expect(stages)
        self.estimate.expect(stages)

    def __call__(self, stage: str, done: int, total: int) -> None:
        super().__call__(stage, done, total)
        self.estimate.report(stage, done, total)
        self.shares.setdefault(stage, []).append(self.estimate.look().share)


AUTO = {
    "unirank": ["calibrate and decompose, whiten", "search, unirank"],
    "fast": ["calibrate and decompose, afm", "measure each linear, fast", "search, fast"],
    "healed": ["gradients, kfac", "calibrate and decompose, kfac", "measure each linear, healed", "search, healed"],
}


@pytest.mark.filterwarnings("ignore::unirank.errors.UnirankWarning")
@pytest.mark.parametrize("too_long", ["", "healed"])
def test_and_a_search_for_the_preset(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, too_long: str
) -> None:
    """Each preset under its name; one that turns out not to fit is passed over; what compresses comes last."""
    point, wanted = Prices.point, preset(too_long) if too_long else None
    seen: list[Preset] = []

    def dear(self: Prices, recipe: Preset) -> float:
        seen.append(recipe)
        late = recipe == wanted and seen.count(recipe) > 1  # at first it is expected to fit
        return point(self, recipe) * (1e12 if late else 1)

    monkeypatch.setattr(Prices, "point", dear)
    target = unirank.Target(max_perplexity_increase=5.0, text=str(text_file), window=24, limit=2, evaluations=2)
    watching = Drawn()
    result = unirank.auto(
        model_dir,
        target,
        place=tmp_path / "place",
        minutes=20,
        presets=tuple(AUTO),
        calibration=unirank.Calibration(text=str(text_file), windows=4, window=24, batch=2),
        device="cpu",
        progress=watching,
    )
    assert watching.unannounced == []
    assert all(watching.ended.values())
    run = [stage for name, stages in AUTO.items() if name != too_long for stage in stages]
    behind = {"unirank": ["truncate"], "fast": ["refine"], "healed": ["refine", "heal"]}[result.preset]
    assert {"load", "perplexity, dense", *run, *behind} == set(watching.reported)
    assert watching.reported[-len(behind) :] == behind
    assert {stage for stages in AUTO.values() for stage in stages} <= set(watching.announced)
    assert watching.announced["compress"].work == 0
    for stage in AUTO["healed"]:
        assert (watching.announced[stage].work == 0) == (too_long == "healed"), stage
    assert watching.shares["search, unirank"][-1] < 0.6
    assert watching.shares["search, fast"][-1] < (1 if too_long else 0.8)
    assert watching.shares[behind[-1]][-1] == pytest.approx(1.0)


SMOLLM2 = Sizes._of(
    tuple(
        (layer, m, n)
        for layer in range(30)
        for m, n in ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
    ),
    30,
    49152 * 576,
)


def test_costs_are_in_proportion_to_what_was_measured() -> None:
    """CPU seconds of `fast` over 8 windows of 512 tokens on one thread, and what the table says of them."""
    recipe: Preset = preset("fast")
    stages = analysis_stages(SMOLLM2, "afm", windows=8, window=512, backward=0)
    stages += stages_behind(SMOLLM2, recipe, windows=8, window=512, ranks_are_given=False)
    measured = {"calibrate and decompose": 31.5, "measure each linear": 211.3, "refine": 65.3}
    unit = sum(measured.values()) / sum(stage.work for stage in stages)
    for stage in stages:
        assert stage.work * unit == pytest.approx(measured[stage.name], rel=0.1), stage.name


def test_early_linears_cost_more_than_late_ones() -> None:
    (stage,) = planning_stages(SMOLLM2, preset("fast"), window=512)
    half = [stage.share(done, 420) for done in (105, 210, 315, 420)]
    assert half[0] == pytest.approx(0.320, abs=0.01)  # measured: 67.6 s of 211.3 s
    assert half[1:] == pytest.approx([0.5, 0.5 + half[0], 1.0])
