"""`unirank.auto` takes the preset that goes furthest in the time that there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import unirank
from tests.support.command_line import command_line as command_line
from unirank import InputError, Target
from unirank.tradeoff import automatic
from unirank.tradeoff.pricing import Prices

CALIBRATION: dict[str, Any] = {"windows": 6, "window": 24, "batch": 2}
WINDOWS: dict[str, Any] = {"window": 24, "limit": 3}


def choose(dense: Path, place: Path, target: Target, text_file: Path, **more: Any) -> unirank.AutoResult:
    calibration = unirank.Calibration(text=str(text_file), **CALIBRATION)
    return unirank.auto(dense, target, place=place, calibration=calibration, device="cpu", **more)


def test_it_takes_the_preset_that_removes_most(dense: Path, text_file: Path, tmp_path: Path) -> None:
    target = Target(max_perplexity_increase=0.02, text=str(text_file), evaluations=3, **WINDOWS)
    result = choose(dense, tmp_path / "curve", target, text_file, presets=("unirank", "fast"))
    removed = {one.preset: one.point.remove for one in result.tried if one.point is not None}
    assert result.compressed.plan.remove == max(removed.values()) == removed[result.preset]
    assert result.reached.increase <= 0.02
    assert {point.preset for point in result.curve.points} == {"unirank", "fast"}
    assert result.compressed.evaluations[0]["dense"] == result.curve.dense.evaluations[0].perplexity
    again = choose(dense, tmp_path / "curve", target, text_file, presets=("unirank", "fast"))
    assert again.compressed.plan == result.compressed.plan
    assert again.curve.points == result.curve.points


def test_a_size_takes_the_best_perplexity(dense: Path, text_file: Path, tmp_path: Path) -> None:
    total = sum(p.numel() for p in unirank.load(str(dense), device="cpu").model.parameters())
    target = Target(params=total - 3000, text=str(text_file), **WINDOWS)
    result = choose(dense, tmp_path / "curve", target, text_file, presets=("unirank", "fast"))
    perplexities = {one.preset: one.point.evaluations[0].perplexity for one in result.tried if one.point is not None}
    assert len(perplexities) == 2
    assert result.preset == min(perplexities, key=lambda name: perplexities[name])
    assert result.compressed.report.model_after <= total - 3000


def test_what_does_not_fit_the_time_is_left_out(dense: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    work = Prices.analysis
    monkeypatch.setattr(Prices, "analysis", lambda self, recipe: work(self, recipe) * (1e9 if recipe.refine else 1))
    target = Target(max_perplexity_increase=0.02, text=str(text_file), evaluations=2, **WINDOWS)
    result = choose(dense, tmp_path / "curve", target, text_file, minutes=5)
    assert result.preset == "unirank"
    assert [one.preset for one in result.tried if one.point is None] == ["fast", "best", "healed", "distilled"]
    assert all("minutes, and " in one.why for one in result.tried[1:])


def test_a_search_ends_where_its_points_take_longer_than_expected(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch
) -> None:
    measured: list[float] = []
    own = automatic.increase_of

    def increase(point, dense) -> float:
        measured.append(point.remove)
        return own(point, dense)

    monkeypatch.setattr(automatic, "increase_of", increase)
    monkeypatch.setattr(automatic._Clock, "left", property(lambda _: 0.0 if measured else 1e6))
    target = Target(max_perplexity_increase=0.02, text=str(text_file), evaluations=6, **WINDOWS)
    result = choose(dense, tmp_path / "curve", target, text_file, minutes=20)
    assert len(measured) == result.tried[0].evaluations == 1


def test_one_evaluation_is_one_of_each_preset(dense: Path, text_file: Path, tmp_path: Path) -> None:
    target = Target(max_perplexity_increase=5.0, text=str(text_file), evaluations=1, **WINDOWS)
    result = choose(dense, tmp_path / "curve", target, text_file, presets=("unirank", "fast"))
    assert [one.evaluations for one in result.tried] == [1, 1]
    assert all(one.point is not None for one in result.tried)


def test_it_says_where_nothing_holds(dense: Path, text_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(automatic, "increase_of", lambda point, dense: 1.0)  # of a random model it may be below 0
    target = Target(max_perplexity_increase=0.1, text=str(text_file), evaluations=2, **WINDOWS)
    with pytest.raises(InputError, match="No preset meets the target"):
        choose(dense, tmp_path / "curve", target, text_file, presets=("unirank",))
    with pytest.raises(InputError, match="minutes = 0 is not legal"):
        choose(dense, tmp_path / "curve", target, text_file, minutes=0)


def test_the_command(dense: Path, text_file: Path, tmp_path: Path, run_unirank) -> None:
    out = tmp_path / "OUT"
    asked = ["auto", str(dense), "-o", str(out), "--max-perplexity-increase", "5%", "--preset", "unirank"]
    asked += ["--calib", str(text_file), "--windows", "6", "--window", "24", "--text", str(text_file)]
    asked += ["--text-limit", "1", "--evaluations", "2", "--device", "cpu"]
    code, told, errors = run_unirank(*asked, "--json")
    assert code == 0, errors
    record = json.loads(told)
    assert record["reached"]["increase"] <= 0.05
    assert record["mb_after"] < record["mb_before"]
    assert (out / "rank_plan.json").is_file()
    assert Path(record["page"]).is_file()
    assert (tmp_path / "OUT-curve" / "curve.json").is_file()
    code, _, errors = run_unirank("auto", dense, "-o", out)
    assert code == 2
    assert "--max-perplexity-increase" in errors
