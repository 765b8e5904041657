"""A backward pass that is killed, interrupted or damaged ends at the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unirank
from tests.support.stores import contents, passing
from unirank.analysis.store import MANIFEST, create_or_resume, open_store
from unirank.types import LoadedModel

pytestmark = pytest.mark.slow

LAYERS = 3
ROOT = Path(__file__).parents[2]
SCHEME = "kfac"
CHILD = Path(__file__).parents[1] / "support" / "harm_analysis.py"

# Files appear in this order (a stage may remove what it has used up in between), and a run is killed behind each one.
ORDER = (
    MANIFEST,
    *(f"forward-{i}" for i in range(LAYERS + 1)),
    f"backward-{LAYERS}",
    *(f"{kind}-{i}" for i in reversed(range(1, LAYERS)) for kind in ("backward", "gradient")),
    "gradient-0",
)
HARM = {f"killed-behind-{file}": ("renamed", position + 1) for position, file in enumerate(ORDER) if position} | {
    f"killed-in-{file}": ("half-written", ORDER.index(file) + 1) for file in ("forward-2", "gradient-1")
}


@pytest.fixture(scope="module")
def harmed(model_path: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores that `HARM` left, by name in one folder."""
    folder = tmp_path_factory.mktemp("harmed")
    jobs = [(kind, count, str(folder / name)) for name, (kind, count) in HARM.items()]
    command = [sys.executable, str(CHILD), str(model_path), str(text_file), json.dumps(jobs), "kfac"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(HARM, -9)
    return folder


def newest(name: str) -> str:
    """File name of the last file that the harmed run `name` finished."""
    kind, number = ORDER[HARM[name][1] - 1].split("-")
    return f"{kind}-{int(number):04d}.safetensors"


def test_finished_store_holds_layers_gradients_and_nothing_else(undisturbed: Path) -> None:
    assert {file.name for file in undisturbed.iterdir()} == {
        MANIFEST,
        *(f"{kind}-{layer:04d}.safetensors" for kind in ("layer", "gradient") for layer in range(LAYERS)),
    }


@pytest.mark.parametrize("name", HARM)
def test_killed_run_resumes_to_the_bytes_of_an_undisturbed_one(
    name: str, harmed: Path, loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(harmed / name, tmp_path / "store"))
    if name.startswith("killed-behind"):
        assert (store / newest(name)).is_file()  # the run was killed where the test thinks
    finished = {file: file.stat().st_mtime_ns for file in store.glob("gradient-*.safetensors")}
    unirank.analyze(loaded, store, scheme="kfac", calibration=settings)
    assert contents(store) == contents(undisturbed)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished


@pytest.mark.parametrize("name", HARM)
def test_opening_a_killed_run_deletes_what_no_step_reads_again(name: str, harmed: Path, undisturbed, tmp_path) -> None:
    path = Path(shutil.copytree(harmed / name, tmp_path / "store"))
    done = open_store(undisturbed)
    store = create_or_resume(path, done.identity, done.linears)
    remaining = store.layers_without_gradients()
    assert not list(path.glob(".*"))
    needed = [f"forward-{i:04d}.safetensors" for i in range(remaining)]
    if remaining and store.has_scratch("backward", remaining):
        assert passing(path) == sorted([*needed, f"backward-{remaining:04d}.safetensors"])
    elif remaining:
        written = [f"forward-{i:04d}.safetensors" for i in range(LAYERS + 1) if store.has_scratch("forward", i)]
        assert passing(path) == written
    else:
        assert all(file.startswith("stream-") for file in passing(path))


def test_a_run_that_is_interrupted_at_every_step_ends_at_the_same_bytes(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    reached: list[int] = []

    def interrupt_when_further(stage: str, done: int, _total: int) -> None:
        if stage == "gradients" and done > max(reached, default=0):
            reached.append(done)
            raise KeyboardInterrupt

    for _ in range(2 * LAYERS):
        with pytest.raises(KeyboardInterrupt):
            unirank.analyze(loaded, tmp_path, scheme="kfac", calibration=settings, progress=interrupt_when_further)
    unirank.analyze(loaded, tmp_path, scheme="kfac", calibration=settings, progress=interrupt_when_further)
    assert reached == list(range(1, 2 * LAYERS + 1))
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.parametrize("lost", ["forward-0000", "forward-0001", "backward-0002"])
def test_what_a_killed_run_needs_and_was_deleted_is_made_again(
    lost: str, harmed: Path, loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(harmed / "killed-behind-gradient-2", tmp_path / "store"))
    (store / f"{lost}.safetensors").unlink()
    unirank.analyze(loaded, store, scheme="kfac", calibration=settings)
    assert contents(store) == contents(undisturbed)


@pytest.mark.parametrize("lost", ["forward-0000", "forward-0001"])
def test_a_hole_in_the_forward_files_is_filled(
    lost: str, harmed: Path, loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(harmed / "killed-behind-forward-3", tmp_path / "store"))
    (store / f"{lost}.safetensors").unlink()
    unirank.analyze(loaded, store, scheme="kfac", calibration=settings)
    assert contents(store) == contents(undisturbed)


@pytest.mark.parametrize("lost", ["gradient-0000", "gradient-0002"])
def test_gradients_lost_from_a_finished_store_are_made_again(
    lost: str, loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(undisturbed, tmp_path / "store"))
    (store / f"{lost}.safetensors").unlink()
    with pytest.raises(unirank.StoreError, match=rf"{lost}\.safetensors is missing.*run the same analyze command"):
        open_store(store).gradients(int(lost[-1]))
    unirank.analyze(loaded, store, scheme="kfac", calibration=settings)
    assert contents(store) == contents(undisturbed)


@pytest.mark.parametrize("file", ["forward-0001", "backward-0002"])
def test_a_damaged_file_is_named_and_deleting_it_helps(
    file: str, harmed: Path, loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(harmed / "killed-behind-gradient-2", tmp_path / "store"))
    damaged = store / f"{file}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(unirank.StoreError, match=rf"{file}\.safetensors is missing or damaged .*delete it"):
        unirank.analyze(loaded, store, scheme="kfac", calibration=settings)
    damaged.unlink()
    unirank.analyze(loaded, store, scheme="kfac", calibration=settings)
    assert contents(store) == contents(undisturbed)
