"""The quality grid: which cells it has, one cell for real on a tiny model, and the table that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import unirank
from bench.quality import quality_grid
from bench.quality.recipes import RECIPES
from unirank.planning.allocator import allocator
from unirank.planning.allocator.base import options_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_the_grid_has_every_scheme_allocator_and_preset_once() -> None:
    presets, schemes, allocators = quality_grid.everything()
    cells = list(quality_grid.cells(presets, schemes, allocators, [0.2, 0.4], range(2)))
    keys = {tuple(cell.values()) for cell in cells}
    assert len(keys) == len(cells) == 1 + 2 * 2 * (2 * len(schemes) + len(allocators) - 2 + len(presets))
    assert {cell["scheme"] for cell in cells if not cell["preset"]} == set(unirank.schemes())
    assert {cell["allocator"] for cell in cells if not cell["preset"]} == {"dense", *unirank.allocators()}


def test_every_recipe_of_the_experiments_can_be_run() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.scheme in unirank.schemes()
        options_of(allocator(recipe.allocator), recipe.options)
        assert name not in unirank.presets()


@pytest.mark.parametrize(
    "cell",
    [
        {"preset": "", "scheme": "whiten", "allocator": "dense", "remove": 0.0},
        {"preset": "", "scheme": "whiten", "allocator": "curvature", "remove": 0.4},
        {"preset": "best", "scheme": "", "allocator": "", "remove": 0.4},
        {"preset": "kfac + curvature, cost_power 0.5", "scheme": "", "allocator": "", "remove": 0.4},
        {"preset": "distilled", "scheme": "", "allocator": "", "remove": 0.4, "form": "pivoted"},
        {"preset": "uniform, pivoted + heal, mix 1", "scheme": "", "allocator": "", "remove": 0.4, "form": "pivoted"},
    ],
    ids=["dense", "curvature", "best", "recipe", "distilled", "healed"],
)
def test_a_cell_runs_in_a_process_of_its_own(cell, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    job = (
        {"form": "factors"}
        | cell
        | {
            "model": str(model_dir),
            "calibration": str(text_file),
            "texts": [str(text_file)],
            "seed": 0,
            "clip": 2,
        }
    )
    job |= {"windows": 6, "window": 24, "limit": 1, "stores": str(tmp_path)}
    text = text_file.read_text().split()
    assert len(text) > 1024
    out = tmp_path / "result.json"
    subprocess.run([sys.executable, "-m", "bench.quality.quality_job", json.dumps(job), out], check=True, cwd=ROOT)
    for stage, presets in (("heal", ("distilled", "uniform, pivoted + heal, mix 1")), ("apply", ("best", "distilled"))):
        assert len(list(tmp_path.glob(f"{stage}-*.json"))) == (job["preset"] in presets)
    record = json.loads(out.read_text())
    assert ("distill" in record["seconds"]) == (job["preset"] == "distilled")
    assert 0 < record["used"] <= record["budget"]
    assert record["peak_mib"] > 10
    assert record["texts"][0]["perplexity"] > 1


def test_the_table_sorts_by_the_first_text_and_shows_the_spread_of_seeds() -> None:
    common = {"scheme": "whiten", "preset": "", "remove": 0.2, "used": 9, "budget": 10, "peak_mib": 100}
    common |= {"store": "s", "gradients": "", "gradients_seconds": 0, "plan_seconds": 1, "apply_seconds": 2}
    rows = [
        common
        | {"allocator": allocator, "seed": seed, "text": text, "perplexity": value + seed}
        | {"analyze_seconds": 30 if (allocator, seed) == ("uniform", 0) else 0.1}  # paid once, shown for all
        for allocator, value in (("uniform", 50.0), ("unirank", 40.0))
        for seed in (0, 1)
        for text in ("a.txt", "b.txt")
    ]
    dense = {"preset": "", "scheme": "-", "allocator": "dense", "remove": 0.0, "store": "", "gradients": "", "seed": 0}
    dense |= {"used": 1, "budget": 1, "peak_mib": 1, "perplexity": 9.0}
    rows += [dense | {"text": text} for text in ("a.txt", "b.txt")]  # nothing was timed
    for row in rows:
        row["gradients"] = ""
    meta = {"calibration_windows": 64, "evaluation_windows": 8, "device": "cpu", "threads": 2}
    meta["versions"] = {"python": "3", "torch": "2"}
    lines = [line for line in quality_grid.markdown(rows, meta).splitlines() if line.startswith("|  | whiten")]
    end = "90.0000% | 0 | 30 | 1 | 2 | 0 | 0 | 2 | 100 |"
    assert lines == [
        f"|  | whiten | unirank | factors | 40.50 (40.0 to 41.0) | 40.50 (40.0 to 41.0) | {end}",
        f"|  | whiten | uniform | factors | 50.50 (50.0 to 51.0) | 50.50 (50.0 to 51.0) | {end}",
    ]
