"""Every benchmark runs, and its result file has the documented keys."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
KEYS = {"op", "shape", "dtype", "baseline", "ratio", "seconds", "baseline_seconds", "gbs"}
NAMES = ("bench_cosine", "bench_gram", "bench_eigh", "bench_topk", "bench_compress", "bench_scaling", "roofline")


@pytest.mark.parametrize("name", NAMES)
def test_quick_run_writes_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    result = tmp_path / "out.json"
    assert importlib.import_module(name).main(["--quick", "--json", str(result)]) == 0
    record = json.loads(result.read_text())
    assert record["rows"]
    for row in record["rows"]:
        assert row.keys() >= KEYS
        assert row["seconds"] >= 0
        assert all(not isinstance(value, dict) for value in row.values()), "rows are flat"
    assert {"versions", "device", "threads"} <= record["meta"].keys()


def test_models_have_the_published_number_of_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    models = importlib.import_module("shapes").MODELS
    assert len(list(models["llama-3-70b"].all_linears())) == 560
    assert sum(m * n for m, n in models["smollm2-135m"].all_linears()) == 106_168_320
