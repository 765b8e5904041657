"""`unirank.curve` and `unirank curve`: one analysis, a ladder of fractions, files and pictures."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import unirank
from tests.support.command_line import Run
from tests.support.measured import a_curve
from tests.support.tiny import WORDS
from unirank import Curve, InputError, StoreError
from unirank.cli.how_far import curve_command, curve_view, read_ladders
from unirank.evaluation import perplexity
from unirank.tradeoff import sweep
from unirank.tradeoff.ladder import LADDER
from unirank.tradeoff.picture import picture
from unirank.tradeoff.showing import markdown

CALIBRATION = ("--windows", "6", "--window", "24", "--batch", "2")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second text."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(400)))
    return path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages of every perplexity that is measured."""
    stages, measure = [], perplexity.EvalWindows.measure

    def noted(self, model, *, stage: str = "", progress=None):
        stages.append(stage)
        return measure(self, model, stage=stage)

    monkeypatch.setattr(perplexity.EvalWindows, "measure", noted)
    return stages


def made(dense: Path, text: Path, place: Path, **more: Any) -> Curve:
    calibration = unirank.Calibration(text=str(text), windows=6, window=24, batch=2)
    asked: dict[str, Any] = {"window": 32, "limit": 4, "device": "cpu", "texts": str(text), "more": 0}
    return unirank.curve(dense, **(asked | {"calibration": calibration, "place": place} | more))


def test_the_curve_of_two_presets_on_two_texts(dense: Path, text_file: Path, other: Path, tmp_path: Path, runs) -> None:
    told = []
    asked: dict[str, Any] = {"presets": ("unirank", "fast"), "remove": (0, 0.3, 0.1), "texts": [text_file, other]}

    def progress(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))

    curve = made(dense, text_file, tmp_path / "out", progress=progress, **asked)
    assert [(point.preset, point.remove) for point in curve.points] == [
        (name, remove) for name in ("unirank", "fast") for remove in (0.1, 0.3)
    ]
    assert curve.texts == (text_file.name, other.name)
    assert len(runs) == 5 * 2
    assert [told_of for told_of in told if told_of[0] == "points"][-1] == ("points", 5, 5)
    assert "truncate" not in {stage for stage, *_ in told}
    assert Curve.from_json((tmp_path / "out" / "curve.json").read_text()) == curve
    assert {path.name for path in (tmp_path / "out").glob("analysis-*")} == {"analysis-whiten", "analysis-afm"}
    for point in curve.points:
        assert point.parameters < curve.dense.parameters
        assert point.flops < curve.dense.flops
        assert point.used <= point.budget
    assert curve.meta["versions"]["unirank"]
    assert curve.meta["stores"]["analysis-afm"] == unirank.open_store(tmp_path / "out" / "analysis-afm").digest
    runs.clear()
    assert made(dense, text_file, tmp_path / "out", **asked) == curve  # a second run finds all of it
    assert runs == []


def test_a_killed_run_goes_on_where_it_ended(dense: Path, text_file: Path, tmp_path: Path, runs) -> None:
    def killed(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("points", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(dense, text_file, tmp_path / "out", remove=(0.1, 0.2), progress=killed)
    kept = Curve.from_json((tmp_path / "out" / "curve.json").read_text())
    assert [point.remove for point in kept.points] == [0.1]
    runs.clear()
    curve = made(dense, text_file, tmp_path / "out", remove=(0.1, 0.2))
    assert runs == ["perplexity, unirank 0.2"]
    assert curve.points[0] == kept.points[0]
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "analysis-whiten").mkdir()  # killed before the first point
    made(dense, text_file, tmp_path / "analysis", remove=(0.1,))


def test_points_are_added_where_the_curve_bends(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def bend(perplexities: dict[float, float]) -> float | None:
        seen.append(dict(perplexities))
        return (0.25, 0.15, None)[min(len(seen) - 1, 2)]

    monkeypatch.setattr(sweep, "next_fraction", bend)
    curve = made(dense, text_file, tmp_path / "out", remove=(0.1, 0.3), more=5)
    assert [point.remove for point in curve.points] == [0.1, 0.15, 0.25, 0.3]
    assert sorted(seen[0]) == [0.0, 0.1, 0.3]
    assert seen[0][0.0] == curve.dense.evaluations[0].perplexity


def test_what_is_out_of_reach_is_said(dense: Path, text_file: Path, tmp_path: Path) -> None:
    curve = made(dense, text_file, tmp_path / "out", remove=(0.1, 0.9), min_rank=8)
    assert [point.remove for point in curve.points] == [0.1]
    (one,) = curve.meta["unreachable"]
    assert (one["preset"], one["remove"]) == ("unirank", 0.9)
    assert "min_rank = 8" in one["reason"]
    assert "at 90 % is out of reach" in markdown(curve)
    with pytest.raises(InputError, match=r"No fraction of remove= is in reach: .*min_rank"):
        made(dense, text_file, tmp_path / "out", remove=(0.9,), min_rank=8)


def test_one_store_serves_its_scheme_and_says_so_before_any_work(
    dense: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = unirank.Calibration(text=str(text_file), windows=6, window=24, batch=2)
    store = unirank.analyze(dense, tmp_path / "store", calibration=calibration, device="cpu")
    loaded = unirank.load(str(dense), device="cpu")
    curve = unirank.curve(loaded, store=store, remove=(0.2,), texts=text_file, window=32, limit=4, more=0)
    assert curve.points[0].evaluations == made(dense, text_file, tmp_path / "a", remove=(0.2,)).points[0].evaluations
    loaded.require_dense()
    monkeypatch.setattr(sweep, "loaded_from", None)
    with pytest.raises(StoreError, match="has the scheme whiten, and afm is needed"):
        made(dense, text_file, tmp_path / "out", store=store, presets=("unirank", "fast"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"presets": ()}, "presets = "),
        ({"presets": ("unirank", "unirank")}, "each once"),
        ({"presets": "none"}, "'none' does not exist"),
        ({"remove": (1.0,)}, "remove = 1.0"),
        ({"remove": {"fast": (0.1,)}}, "the preset 'fast', and the curve is of unirank"),
        ({"more": -1}, "more = -1"),
        ({"form": "round"}, "form = 'round'"),
        ({"min_rank": 0}, "min_rank = 0"),
        ({"texts": "nowhere.txt"}, "nowhere.txt"),
        ({"texts": ()}, "at least one text"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    wrong: dict[str, Any], message: str, dense: Path, text_file: Path, tmp_path: Path, runs
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        made(dense, text_file, tmp_path / "out", **({"remove": (0.1,)} | wrong))
    assert runs == []
    assert not (tmp_path / "out" / "analysis-whiten").exists()


def test_the_picture_stands_alone() -> None:
    drawn = picture(a_curve())
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    charts = root.findall("{http://www.w3.org/2000/svg}svg")
    assert len(charts) == 2
    for chart in charts:
        lines = chart.findall("{http://www.w3.org/2000/svg}polyline")
        assert [len(line.attrib["points"].split()) for line in lines] == [3, 2]
    texts = [text.text for text in root.findall("{http://www.w3.org/2000/svg}text")]
    assert texts == ["perplexity on first", "perplexity on second", "unirank", "fast"]
    assert "<ul" not in drawn


def test_markdown_has_a_row_a_point() -> None:
    rows = [line for line in markdown(a_curve()).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["preset", "dense", "unirank", "unirank", "fast"]
    assert " 24.00 | 1.200 | 36.00 | 1.200 |" in rows[2]


def test_what_comes_next_is_a_point_of_the_preset_that_is_named() -> None:
    said = str(curve_view(a_curve(), [], "a/model", Path("out"), None, None)[-1])
    assert said == "Next: unirank compress a/model -o OUT --preset fast --store out/analysis-afm --remove 0.2"


def test_the_command(dense: Path, text_file: Path, other: Path, tmp_path: Path, run_unirank: Run) -> None:
    out, text = tmp_path / "out", ("--text", text_file, "--text", other, "--text-window", "32", "--text-limit", "3")
    asked = ("-r", "0.1", "-r", "0.3", "--more", "0", "--calib", text_file, *CALIBRATION)
    code, stdout, stderr = run_unirank("curve", dense, "-o", out, *text, *asked, "--png")
    assert code == 0, stderr
    assert "seconds a point (2 points)" in stdout
    assert f"Next: unirank compress {dense} -o OUT --preset unirank" in stdout.replace("\n", " ")
    assert {file.name for file in out.iterdir() if file.is_file()} == {
        "curve.json",
        "curve.md",
        "curve.svg",
        "curve.png",
    }
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    code, stdout, stderr = run_unirank(
        "curve",
        out / "analysis-whiten",
        "--against",
        dense,
        "-o",
        out,
        *text,
        *asked[:6],
        "--calib",
        text_file,
        "--json",
    )
    assert code == 0, stderr
    record = json.loads(stdout)
    assert record.pop("out") == str(out)
    assert Curve.from_json(json.dumps(record)) == Curve.from_json((out / "curve.json").read_text())
    for arguments, message in (
        ((out / "analysis-whiten",), "give the dense model with --against"),
        ((dense, "--against", dense), "leave --against out"),
        ((out / "analysis-whiten", "--against", dense, "--preset", "fast"), "has the scheme whiten, and afm is needed"),
        ((dense, "--preset", "x"), "preset 'x' does not exist"),
    ):
        code, _, stderr = run_unirank("curve", *arguments, "-o", tmp_path / "other")
        assert code in (2, 3)
        assert message in stderr
    assert not (tmp_path / "other").exists()


def test_fractions_by_preset() -> None:
    both = ["unirank", "fast"]
    assert read_ladders(None, both) is None
    assert read_ladders(["0.1", "0.2"], both) == {"unirank": [0.1, 0.2], "fast": [0.1, 0.2]}
    assert read_ladders(["fast=0.2,0.4", "fast=0.5"], both) == {"fast": [0.2, 0.4, 0.5]}
    assert read_ladders(["0.1", "fast=0.2"], both) == {"unirank": [0.1], "fast": [0.2]}
    for wrong in ("x", "fast=", "fast=0.2;0.4", "fast=0.2,"):
        with pytest.raises(InputError, match=r"--remove .* is not legal"):
            read_ladders([wrong], both)


def test_the_help_names_the_ladder() -> None:
    said = inspect.signature(curve_command).parameters["remove"].annotation
    assert all(f"{fraction:g}" in said for fraction in LADDER)


@pytest.mark.slow
@pytest.mark.smollm2
def test_two_points_of_the_real_model(smollm2: str, tmp_path: Path) -> None:
    """Its perplexity rises with what is removed, and a point is what `compress` makes."""
    calibration = unirank.Calibration(windows=6, window=256)
    asked: dict[str, Any] = {"texts": "builtin-held-out", "window": 512, "limit": 1, "more": 0, "remove": (0.05, 0.2)}
    curve = unirank.curve(smollm2, calibration=calibration, place=tmp_path / "out", device="cpu", **asked)
    perplexities = [point.evaluations[0].perplexity for point in curve.of("unirank")]
    assert perplexities == sorted(perplexities)
    store = tmp_path / "out" / "analysis-whiten"
    compressed = unirank.compress(smollm2, 0.2, store=store, device="cpu")
    report = unirank.evaluate(compressed.model, compressed.tokenizer, text="builtin-held-out", window=512, limit=1)
    assert report == curve.points[-1].evaluations[0]
