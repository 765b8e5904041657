"""An analysis that is killed, or finds the disk full, resumes to the bytes of an undisturbed one."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import unirank
from tests.support.stores import contents, flip
from unirank.analysis.store import MANIFEST, open_store
from unirank.types import LoadedModel

pytestmark = pytest.mark.slow

LAYERS = 5
ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).parents[1] / "support" / "harm_analysis.py"

_pick = random.Random(0)
KILLED_AFTER = _pick.randint(1, LAYERS - 1)
# Files appear in the order manifest, stream 1, layer 0, stream 2, layer 1, ..., layer 4.
HALF_WRITTEN_LAYER, RENAMED_LAYER = (2 * _pick.randint(1, LAYERS - 1) + 1 for _ in range(2))
HARM = {
    "killed-after-a-layer": ("layer", KILLED_AFTER),
    "killed-in-the-manifest": ("half-written", 1),
    "killed-in-a-stream": ("half-written", 2 * _pick.randint(1, LAYERS - 1)),
    "killed-in-a-layer": ("half-written", HALF_WRITTEN_LAYER),
    "killed-behind-a-layer": ("renamed", RENAMED_LAYER),
    "killed-behind-the-last-layer": ("renamed", 2 * LAYERS),
    "full-disk": ("full", 2),
}


@pytest.fixture(scope="module")
def harmed(model_path: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The stores that `HARM` left, by name in one folder, and what the process printed."""
    folder = tmp_path_factory.mktemp("harmed")
    jobs = [(kind, count, str(folder / name)) for name, (kind, count) in HARM.items()]
    command = [sys.executable, str(CHILD), str(model_path), str(text_file), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {name: 5 if name == "full-disk" else -9 for name in HARM}
    return folder, done.stdout


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the layers that `analyze` calibrates from here on."""
    module = importlib.import_module("unirank.analysis.fill_store")
    original: Callable = module.calibrate_layer
    seen: list[int] = []

    def counted(model: LoadedModel, index: int, *args: object, **kwargs: object) -> object:
        seen.append(index)
        return original(model, index, *args, **kwargs)

    monkeypatch.setattr(module, "calibrate_layer", counted)
    return seen


@pytest.mark.parametrize("name", HARM)
def test_interrupted_run_resumes_to_the_bytes_of_an_undisturbed_one(
    name: str,
    harmed: tuple[Path, str],
    loaded: LoadedModel,
    settings: unirank.Calibration,
    undisturbed: Path,
    calibrated: list[int],
    tmp_path: Path,
) -> None:
    store = Path(shutil.copytree(harmed[0] / name, tmp_path / "store"))
    finished = sorted(store.glob("layer-*.safetensors"))
    times = [file.stat().st_mtime_ns for file in finished]
    unirank.analyze(loaded, store, calibration=settings)
    assert contents(store) == contents(undisturbed)
    assert [file.stat().st_mtime_ns for file in finished] == times
    assert calibrated == list(range(len(finished), LAYERS))


def test_killed_run_leaves_the_layers_it_finished(harmed: tuple[Path, str], undisturbed: Path) -> None:
    whole = contents(undisturbed)
    counts = {}
    for name in HARM:
        layers = {file: data for file, data in contents(harmed[0] / name).items() if file.startswith("layer-")}
        assert layers.items() <= whole.items()
        counts[name] = len(layers)
    assert counts["killed-after-a-layer"] == KILLED_AFTER
    assert counts["killed-in-a-layer"] == HALF_WRITTEN_LAYER // 2 - 1
    assert counts["killed-behind-a-layer"] == RENAMED_LAYER // 2
    assert counts["killed-in-the-manifest"] == 0
    assert counts["full-disk"] == 2


def test_full_disk_is_reported_and_leaves_nothing_half_written(harmed: tuple[Path, str], undisturbed: Path) -> None:
    folder, printed = harmed
    store = folder / "full-disk"
    assert f"Could not write {store / 'stream-0003.safetensors'}" in printed
    assert set(contents(store)) == {
        MANIFEST,
        "layer-0000.safetensors",
        "layer-0001.safetensors",
        "stream-0002.safetensors",
    }
    with pytest.raises(unirank.StoreError, match="2 of 5 layers"):
        unirank.plan(open_store(store), 0.2)


def test_finished_store_is_reused_without_calibrating(
    loaded: LoadedModel, settings: unirank.Calibration, copied: Path, calibrated: list[int]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in copied.iterdir()}
    unirank.analyze(loaded, copied, calibration=settings)
    assert calibrated == []
    assert {file: file.stat().st_mtime_ns for file in copied.iterdir()} == before


def test_lost_layer_is_computed_again_though_its_stream_is_gone(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, copied: Path
) -> None:
    (copied / "layer-0002.safetensors").unlink()
    unirank.analyze(loaded, copied, calibration=settings)
    assert contents(copied) == contents(undisturbed)


def test_flipped_bit_in_a_stream_stops_the_run_that_would_go_on(
    harmed: tuple[Path, str], loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(harmed[0] / "full-disk", tmp_path / "store"))
    flip(store / "stream-0002.safetensors", 50)
    with pytest.raises(unirank.StoreError, match=r"stream-0002\.safetensors is missing or damaged .*other bytes"):
        unirank.analyze(loaded, store, calibration=settings)


def test_truncated_stream_is_named_and_deleting_it_helps(
    harmed: tuple[Path, str], loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(harmed[0] / "full-disk", tmp_path / "store"))
    file = store / "stream-0002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(unirank.StoreError, match=r"stream-0002\.safetensors is missing or damaged .*delete it"):
        unirank.analyze(loaded, store, calibration=settings)
    file.unlink()
    unirank.analyze(loaded, store, calibration=settings)
    assert contents(store) == contents(undisturbed)
