"""Every benchmark runs, and its result file has the documented keys."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

KEYS = {"op", "shape", "dtype", "baseline", "ratio", "seconds", "baseline_seconds", "gbs"}
OPS = ("ops.bench_cosine", "ops.bench_gram", "ops.bench_eigh", "ops.bench_topk")
PIPELINE = ("compress", "scaling", "inference", "large", "processes", "stages", "heal")
NAMES = (*OPS, "ops.bench_matmul", *(f"pipeline.bench_{name}" for name in PIPELINE), "support.roofline")


@pytest.mark.parametrize("name", NAMES)
def test_quick_run_writes_rows(name: str, tmp_path: Path) -> None:
    result = tmp_path / "out.json"
    assert importlib.import_module(f"bench.{name}").main(["--quick", "--json", str(result)]) == 0
    record = json.loads(result.read_text())
    assert record["rows"]
    for row in record["rows"]:
        assert row.keys() >= KEYS
        assert row["seconds"] >= 0
        assert all(not isinstance(value, dict) for value in row.values()), "rows are flat"
    assert {"versions", "device", "threads"} <= record["meta"].keys()


@pytest.mark.parametrize("name", OPS)
def test_without_a_gpu_the_cuda_mode_skips_and_fails_only_on_demand(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = importlib.import_module(f"bench.{name}").main
    monkeypatch.delenv("UNIRANK_REQUIRE_CUDA", raising=False)
    with pytest.raises(SystemExit) as skipped:
        main(["--device", "cuda"])
    assert skipped.value.code == 0
    assert capsys.readouterr().out == "skipped: no CUDA device is usable\n"
    monkeypatch.setenv("UNIRANK_REQUIRE_CUDA", "1")
    with pytest.raises(SystemExit, match="UNIRANK_REQUIRE_CUDA=1, but no CUDA device is usable"):
        main(["--device", "cuda"])


def test_a_floor_stands_beside_the_times_of_a_gpu_that_the_model_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    roofline, timing = (importlib.import_module(f"bench.{name}") for name in ("support.roofline", "support.timing"))
    work = roofline.cosine_work(4096, 4096, torch.float32)
    assert roofline.gpu_floor(work, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    floor = roofline.gpu_floor(work, torch.device("cuda", 0))
    assert floor == 2 * 4 * 4096**2 / 3.35e12
    row = timing.row("cosine", "4096 x 4096", "float32", "twin", [3 * floor], [6 * floor], floor=floor)
    assert (row["model_seconds"], row["over_model"]) == (floor, 3)
    timing.show([row], torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another GPU")
    assert roofline.gpu_floor(work, torch.device("cuda", 0)) is None


def test_models_have_the_published_number_of_components() -> None:
    models = importlib.import_module("bench.support.shapes").MODELS
    assert len(list(models["llama-3-70b"].all_linears())) == 560
    assert sum(m * n for m, n in models["smollm2-135m"].all_linears()) == 106_168_320
