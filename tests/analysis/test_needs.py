"""What a run will need, before it starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import unirank
from tests.support.command_line import Run
from tests.support.pretend import pretend_gpu
from unirank import InputError, costs
from unirank.analysis import needs as module
from unirank.analysis.needs import Needs, dry_run
from unirank.analysis.overlap import THREADS, Shares, needs_of_decomposition
from unirank.costs import Sizes
from unirank.recipes import preset as preset_of
from unirank.stages import with_stages_behind

GIB = 2**30
ROOMY = Needs(10.0, 2 * GIB, 2 * GIB, GIB, GIB, 4 * GIB, 4 * GIB, 3, "cpu")


@pytest.fixture
def streamed(model_dir: Path) -> unirank.LoadedModel:
    return unirank.load(model_dir, device="cpu", stream=True)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("scheme", ["svd", "whiten", "kfac"])
def test_the_disk_is_what_the_store_takes(
    scheme: str, streamed, calibration: unirank.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(tmp_path)
    found = dry_run(streamed, tmp_path / "new" / "store", scheme=scheme, calibration=calibration)
    assert files(tmp_path) == before
    assert found.layers == 3
    assert 0 < found.seconds < 60
    assert found.stream_memory < found.whole_memory == found.memory
    store = unirank.analyze(streamed, tmp_path / "store", scheme=scheme, calibration=calibration)
    kept = sum(file.stat().st_size for file in store.path.glob("*.safetensors"))
    streams = 2 * calibration.windows * calibration.window * 32 * 4
    if scheme == "kfac":  # the inputs of all layers, and what is behind the last
        streams += 4 * calibration.windows * calibration.window * 32 * 4
    assert found.disk == pytest.approx(kept + streams, rel=0.1)


def test_more_windows_need_more(streamed, calibration: unirank.Calibration, tmp_path: Path) -> None:
    one, two = (
        dry_run(streamed, tmp_path, calibration=dataclasses.replace(calibration, windows=windows))
        for windows in (2, 100)
    )
    hidden = calibration.window * 32 * 4
    assert two.disk - one.disk == pytest.approx(2 * 98 * hidden, rel=0.01)
    assert two.stream_memory - one.stream_memory >= 2 * 98 * hidden


def test_the_checkpoint_counts(streamed, calibration: unirank.Calibration, tmp_path: Path) -> None:
    without = dry_run(streamed, tmp_path, calibration=calibration)
    found = dry_run(streamed, tmp_path, calibration=calibration, remove=0.5)
    linears = sum(spec.params for spec in streamed.linears)
    others = sum(p.numel() for p in streamed.model.parameters()) - linears
    assert found.disk - without.disk == 4 * (linears // 2 + others)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"available_memory": GIB}, r"needs 2\.00 GiB of memory, and 1\.00 GiB are free; stream=True needs 1\.00 GiB"),
        ({"available_memory": GIB // 2}, r"0\.50 GiB are free; a shorter Calibration\.window, a smaller"),
        ({"available_disk": GIB // 4}, r"needs 1\.00 GiB on the disk, and 0\.25 GiB are free"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(changes: dict[str, int], words: str | None) -> None:
    found = dataclasses.replace(ROOMY, **changes)
    assert found.fits is (words is None)
    if words is None:
        found.require_fit()
        return
    with pytest.raises(InputError, match=words):
        found.require_fit()


def test_the_commands_print_it_and_do_nothing_else(
    run_unirank: Run,
    model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = ["--calib", text_file, "--windows", 6, "--window", 24, "--device", "cpu", "--dry-run"]
    before = files(tmp_path)
    code, out, err = run_unirank("analyze", model_dir, "-o", tmp_path / "store", *common)
    assert (code, err) == (0, "")
    assert "Estimate from one of 3 layers" in out
    code, out, _ = run_unirank("compress", model_dir, "-r", 0.3, "-o", tmp_path / "out", *common, "--stream", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["fits"] is True
    assert record["memory"] == record["stream_memory"]
    assert files(tmp_path) == before
    monkeypatch.setattr(module, "_available", lambda _device: 10 * 2**20)
    code, _, err = run_unirank("analyze", model_dir, "-o", tmp_path / "store", *common)
    assert code == 2
    assert "0.01 GiB are free; a shorter --window" in err


def test_recipes_that_run_the_whole_model_cannot_be_streamed(run_unirank: Run, model_dir: Path, tmp_path: Path) -> None:
    arguments = ["compress", model_dir, "-r", 0.3, "-o", tmp_path / "out", "--preset", "fast"]
    code, _, err = run_unirank(*arguments, "--stream")
    assert code == 2
    assert "the allocator lems and the second pass would run the whole model" in err


@pytest.mark.parametrize(
    ("preset", "stages"),
    [
        ("unirank", []),
        ("fast", ["measure each linear", "refine"]),
        ("healed", ["measure each linear", "refine", "heal"]),
        ("distilled", ["measure each linear", "refine", "heal", "sample", "distill"]),
    ],
)
def test_the_time_of_what_follows_the_analysis_is_told(
    preset: str, stages: list[str], run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    common = ["--calib", text_file, "--windows", 6, "--window", 24, "--device", "cpu", "--dry-run"]
    arguments = ["compress", model_dir, "-r", 0.3, "-o", tmp_path / "out", "--preset", preset, *common]
    before = files(tmp_path)
    code, out, err = run_unirank(*arguments, "--json")
    record = json.loads(out)
    assert (code, err) == (0, "")
    assert files(tmp_path) == before
    assert list(record["behind"]) == stages
    assert all(seconds > 0 for seconds in record["behind"].values())
    assert sum(record["behind"].values()) < record["seconds"]
    code, out, _ = run_unirank(*arguments)
    assert code == 0
    assert all(f"  {stage} " in out for stage in stages)
    assert ("from a table of costs" in out) is bool(stages)


def test_the_time_of_the_stages_is_that_of_the_table(
    streamed, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    """In units of the analysis, with truncation and writing, that the dry run has worked on."""
    chosen = preset_of("healed")
    asked = dataclasses.replace(calibration, gradient_windows=4)
    needs = dataclasses.replace(ROOMY, seconds=100.0)
    found = with_stages_behind(needs, streamed, chosen, asked, ranks_are_given=True)
    sizes, tokens = Sizes.of(streamed), asked.windows * asked.window
    tried = [costs.gradients(sizes, 4 * asked.window), costs.calibration(sizes, "kfac", tokens)]
    tried += [costs.truncation(sizes), costs.save(sizes)]
    rate = 100 / sum(stage.work for stage in tried)
    assert found.behind == {
        "refine": pytest.approx(rate * costs.second_pass(sizes, tokens).work),
        "heal": pytest.approx(rate * costs.healing(sizes, tokens, 3).work),
    }
    assert found.analysis_seconds == pytest.approx(100)
    assert "seconds:" not in repr(needs)
    assert "seconds: analysis 100, refine" in repr(found)


def test_streamed_commands_give_the_same_checkpoint(
    run_unirank: Run,
    model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    common = ["-r", 0.3, "--calib", text_file, "--windows", 6, "--window", 24, "--device", "cpu"]
    outs = []
    for flags in ([], ["--stream"]):
        outs.append(tmp_path / f"out{len(flags)}")
        code, _, err = run_unirank("compress", model_dir, "-o", outs[-1], *common, *flags)
        assert (code, err) == (0, "")
    whole, streamed = ({file.name: file.read_bytes() for file in out.iterdir()} for out in outs)
    assert whole.keys() == streamed.keys()
    for name in ("rank_plan.json", "provenance.json", "README.md"):
        assert whole[name] == streamed[name]


def test_a_gpu_counts_what_runs_beside_and_no_hidden_states_on_the_disk(
    model_dir: Path, calibration: unirank.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decomposition beside the calibration takes memory and saves time; hidden states are written only if asked."""
    hidden = calibration.windows * calibration.window * 32 * 4
    with pretend_gpu(), sdpa_kernel(SDPBackend.MATH):
        loaded = unirank.load(model_dir, device="cuda", stream=True)
        found = dry_run(loaded, tmp_path, calibration=calibration)
        kept = dry_run(loaded, tmp_path, calibration=calibration, keep_hidden=True)
        monkeypatch.setattr("unirank.analysis.needs.shares_of", lambda *_: Shares(False, 0))
        in_turns = dry_run(loaded, tmp_path, calibration=calibration)
    assert kept.disk - found.disk == pytest.approx(2 * hidden, rel=0.05)
    largest, held = needs_of_decomposition(loaded.linears, torch.float64)
    weights = 4 * sum(spec.params for spec in loaded.linears if spec.layer == 0)
    assert found.whole_memory - in_turns.whole_memory == held + THREADS * largest
    assert found.stream_memory - in_turns.stream_memory == held + THREADS * largest + weights
