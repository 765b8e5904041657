"""The honest table: a tiny one is made and resumed, and its sentences follow from its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.quality import bench_bytes, bytes_job, bytes_page

pytestmark = pytest.mark.slow


def test_a_tiny_table_is_made_resumed_and_its_speeds_measured_again(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("wiki.valid.txt", "wiki.test.raw"):
        (data / name).write_text(text_file.read_text())
    out, page = tmp_path / "bytes.json", tmp_path / "bytes.md"
    options = ["--work", str(tmp_path / "work"), "--data", str(data), "--model", str(model_dir), "--remove", "0.4"]
    options += ["--windows", "6", "--window", "24", "--limit", "1", "--evaluation-window", "64", "--prompt", "16"]
    options += ["--repeats", "1", "--json", str(out), "--markdown", str(page)]
    steps = []

    def step(job: dict[str, Any]) -> dict[str, Any]:
        steps.append(job["step"])
        return bytes_job.STEPS[job["step"]](job)

    assert bench_bytes.main(options, step) == 0
    assert steps == ["checkpoint"] + ["row"] * 7 + ["speed"]
    record = json.loads(out.read_text())
    rows = {one["row"]: one for one in record["rows"]}
    assert list(rows) == [*(f"dense-{bits}" for bits in (32, 16, 8, 4)), *(f"best-40-{bits}" for bits in (16, 8, 4))]
    for one in rows.values():
        assert one["file_perplexity"] > 1
        assert one["builtin-held-out_perplexity"] > 1
        assert one["prefill_tokens_per_second"] > 0
        assert one["decode_tokens_per_second"] > 0
        assert all(not isinstance(value, dict) for value in one.values()), "rows are flat"
    for kind in ("disk", "memory"):
        sizes = {name: one[f"{kind}_bytes"] for name, one in rows.items()}
        assert sizes["dense-32"] > sizes["dense-16"] > sizes["dense-8"] > sizes["dense-4"]
        assert sizes["dense-16"] > sizes["best-40-16"]
    assert rows["dense-8"]["file_perplexity"] == pytest.approx(rows["dense-16"]["file_perplexity"], rel=0.02)
    assert page.read_text() == bytes_page.markdown(record["rows"], record["meta"])
    first = json.loads((tmp_path / "work" / "speed.json").read_text())
    steps.clear()
    bench_bytes.main(options, step)
    assert steps == []
    bench_bytes.main([*options, "--speed"], step)
    assert steps == ["speed"]
    assert json.loads((tmp_path / "work" / "speed.json").read_text()) != first


def test_a_checkpoint_of_another_recipe_is_refused(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = {"text": str(text_file), "windows": 6, "window": 24, "seed": 0, "gradient_windows": 6}
    job = {"model": str(model_dir), "remove": 0.4, "place": str(tmp_path / "out"), "store": str(tmp_path / "store")}
    bytes_job.checkpoint(job | {"preset": "fast", "calibration": calibration})
    with pytest.raises(SystemExit, match="take another folder"):
        bytes_job.checkpoint(job | {"preset": "best", "calibration": calibration})
    with pytest.raises(SystemExit, match=r"has 0\.4 removed, not 0\.2"):
        bytes_job.checkpoint(job | {"preset": "fast", "calibration": calibration, "remove": 0.2})


def rows_of(figures: dict[tuple[float, int], tuple[float, float, float]]) -> list[dict[str, Any]]:
    """From megabytes, perplexity and tokens a second by removed fraction and bits."""
    return [
        {"row": f"{remove}-{bits}", "remove": remove, "bits": bits, "disk_bytes": size * 1e6}
        | {"file_perplexity": perplexity, "builtin-held-out_perplexity": perplexity}
        | {"prefill_tokens_per_second": rate, "decode_tokens_per_second": rate}
        for (remove, bits), (size, perplexity, rate) in figures.items()
    ]


FIGURES = {
    (0.0, 32): (400.0, 10.0, 50.0),
    (0.0, 16): (200.0, 10.0, 100.0),
    (0.0, 8): (100.0, 10.1, 100.0),
    (0.0, 4): (60.0, 14.0, 100.0),
    (0.4, 16): (120.0, 30.0, 150.0),
    (0.4, 8): (60.0, 30.3, 102.0),
    (0.4, 4): (40.0, 60.0, 90.0),
}


def test_the_sentences_follow_from_the_figures() -> None:
    rows = rows_of(FIGURES)
    assert [one["row"] for one in bytes_page.frontier(rows)] == ["0.0-16", "0.0-8", "0.0-4", "0.4-4"]
    alone, eight, four, cost_8, cost_4, prefill, _, unbeaten = bytes_page.findings(rows)
    assert "larger and worse at every ratio. If only bytes matter, take 8 bits" in alone
    assert "40% fewer bytes on disk at 40% removed, and 3.00 times the perplexity" in eight
    assert "33% fewer bytes on disk at 40% removed, and 4.29 times" in four
    assert "+1.0% at 40% removed, +1.0% dense; nowhere more" in cost_8
    assert "+100.0% at 40% removed, +40.0% dense; more at 40% removed" in cost_4
    assert "1.50 (bfloat16); 1.02 (8 bits); 0.90 (4 bits). At 40% it is faster with bfloat16, by" in prefill
    assert unbeaten.endswith("40% in 4 bits, 40 MB at perplexity 60.0.")
    other = bytes_page.findings(rows_of(FIGURES | {(0.4, 16): (90.0, 12.0, 100.0)}))
    assert "is at no ratio both larger and worse" in other[0]
    assert "with no weights faster" in bytes_page.findings(rows_of(FIGURES | {(0.4, 16): (90.0, 12.0, 104.0)}))[5]


def test_the_rows_of_the_readme_are_those_of_the_page() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "bytes.md").read_text().splitlines()
    record = json.loads((root / "docs" / "bytes.json").read_text())
    assert len([line for line in page if line.startswith("| ")]) == 1 + len(record["rows"])
    table = (root / "README.md").read_text().split("| removed | weights |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 6
    assert [line for line in table if line not in page] == []
