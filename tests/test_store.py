"""The analysis store: whole or resumable, equal for equal inputs, and never mistaken for another's."""

from __future__ import annotations

import dataclasses
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
import torch

import unirank
from tests.conftest import build
from tests.tiny import made_up_identity
from unirank.calibrate import Streams
from unirank.store import MANIFEST, create_or_resume, open_store
from unirank.types import CosineStat, Factors, LinearSpec, LoadedModel

LAYERS = 5
ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("harm_analysis.py")

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
def model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("model")
    build("llama", num_hidden_layers=LAYERS).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> LoadedModel:
    return unirank.load(str(model_path), device="cpu")


@pytest.fixture(scope="module")
def settings(text_file: Path) -> unirank.Calibration:
    return unirank.Calibration(text=str(text_file), windows=6, window=24, seed=0, batch=2)


@pytest.fixture(scope="module")
def undisturbed(loaded: LoadedModel, settings: unirank.Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that tests only read."""
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    unirank.analyze(loaded, path, calibration=settings)
    return path


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
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """A finished store to damage."""
    return Path(shutil.copytree(undisturbed, tmp_path / "store"))


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the layers that `analyze` calibrates from here on."""
    module = importlib.import_module("unirank.analyze")
    original: Callable = module.calibrate_layer
    seen: list[int] = []

    def counted(model: LoadedModel, index: int, *args: object, **kwargs: object) -> object:
        seen.append(index)
        return original(model, index, *args, **kwargs)

    monkeypatch.setattr(module, "calibrate_layer", counted)
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# -- what is written is what is read ------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    specs = (LinearSpec("l.0.a", 0, "attention", "a", 4, 6), LinearSpec("l.0.b", 0, "mlp", "b", 6, 4))
    generator = torch.Generator().manual_seed(0)
    factors = {
        spec.name: Factors(
            torch.randn(spec.m, 3, generator=generator),
            torch.randn(3, spec.n, generator=generator),
            torch.tensor([4.0, 2.0, 1.0, 1e-300], dtype=torch.float64),
            damping=0.5,
        )
        for spec in specs
    }
    cosines = {"attention": CosineStat(0.1, 0.01, 7), "mlp": CosineStat(1 / 3, 0.2, 7), "block": CosineStat(-0.5, 1, 7)}
    identity = made_up_identity()
    store = create_or_resume(tmp_path / "store", identity, specs)
    assert not store.complete
    store.write_layer(0, factors, cosines, Streams([], torch.zeros(1)))
    opened = open_store(tmp_path / "store")
    assert opened == store
    assert opened.digest == store.digest
    assert opened.complete
    assert opened.cosines() == [cosines]
    energies = opened.energies()
    assert list(energies) == [spec.name for spec in specs]
    for spec in specs:
        assert torch.equal(energies[spec.name], factors[spec.name].energy)
        left, right = opened.factors(spec, 2)
        assert torch.equal(left, factors[spec.name].left[:, :2])
        assert torch.equal(right, factors[spec.name].right[:2])
    with pytest.raises(unirank.StoreError, match=r"holds 3 components of l\.0\.a, the plan asks for 4"):
        opened.factors(specs[0], 4)


def test_streams_are_read_back_in_the_order_of_the_batches(loaded: LoadedModel, tmp_path: Path) -> None:
    store = create_or_resume(tmp_path, {}, loaded.linears)
    batches = [torch.full((2, 3, 4), float(i)) for i in range(12)]
    store.write_layer(0, {}, {}, Streams(batches, torch.ones(1, 3, 4)))
    found = store.read_streams(1, torch.device("cpu"))
    assert torch.equal(torch.stack(found.batches), torch.stack(batches))
    assert torch.equal(found.probe, torch.ones(1, 3, 4))


def test_finished_store_holds_a_file_a_layer_and_nothing_else(undisturbed: Path) -> None:
    assert {file.name for file in undisturbed.iterdir()} == {
        MANIFEST,
        *(f"layer-{layer:04d}.safetensors" for layer in range(LAYERS)),
    }


def test_number_of_threads_does_not_change_a_byte(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            unirank.analyze(loaded, tmp_path / str(threads), calibration=settings)
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "1") == contents(tmp_path / "4") == contents(undisturbed)


# -- interruption ---------------------------------------------------------------------------------------------------


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
    loaded: LoadedModel, settings: unirank.Calibration, copy: Path, calibrated: list[int]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.iterdir()}
    unirank.analyze(loaded, copy, calibration=settings)
    assert calibrated == []
    assert {file: file.stat().st_mtime_ns for file in copy.iterdir()} == before


def test_lost_layer_is_computed_again_though_its_stream_is_gone(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, copy: Path
) -> None:
    (copy / "layer-0002.safetensors").unlink()
    unirank.analyze(loaded, copy, calibration=settings)
    assert contents(copy) == contents(undisturbed)


# -- other inputs -----------------------------------------------------------------------------------------------------


def _other_model(loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path):
    model = build("llama", num_hidden_layers=LAYERS)
    model.model.norm.weight.data[0] += 1
    return unirank.describe(model, loaded.tokenizer), settings, "whiten"


def _other_text(loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path):
    words = Path(settings.text).read_text(encoding="utf-8").split()
    (tmp_path / "words.txt").write_text(" ".join(reversed(words)), encoding="utf-8")
    return loaded, dataclasses.replace(settings, text=str(tmp_path / "words.txt")), "whiten"


def _changed(**changes: int):
    return lambda loaded, settings, tmp_path: (loaded, dataclasses.replace(settings, **changes), "whiten")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_model, ["model.weights_sha256"]),
        (_other_text, ["calibration.text_sha256", "calibration.windows_sha256"]),
        (lambda loaded, settings, tmp_path: (loaded, settings, "svd"), ["scheme (store: 'whiten', now: 'svd')"]),
        (_changed(seed=1), ["calibration.seed (store: 0, now: 1)"]),
        (_changed(batch=3), ["calibration.batch (store: 2, now: 3)"]),
        (_changed(windows=5), ["calibration.windows (store: 6, now: 5)"]),
    ],
)
def test_store_of_another_analysis_is_refused_and_says_what_differs(
    change: Callable, named: list[str], loaded: LoadedModel, settings: unirank.Calibration, copy: Path, tmp_path: Path
) -> None:
    model, calibration, scheme = change(loaded, settings, tmp_path)
    before = contents(copy)
    with pytest.raises(unirank.StoreError, match="belongs to another analysis") as caught:
        unirank.analyze(model, copy, scheme=scheme, calibration=calibration)
    assert all(name in str(caught.value) for name in named)
    assert contents(copy) == before


def test_overwrite_replaces_a_store_of_another_analysis(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, copy: Path
) -> None:
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    other = dataclasses.replace(settings, seed=1)
    store = unirank.analyze(loaded, copy, calibration=other, overwrite=True)
    assert store.identity["calibration"]["seed"] == 1
    assert (copy / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert contents(copy).keys() - {"notes.txt"} == contents(undisturbed).keys()
    assert contents(copy)["layer-0000.safetensors"] != contents(undisturbed)["layer-0000.safetensors"]
    empty = create_or_resume(copy, {"scheme": "other"}, loaded.linears, overwrite=True)
    assert empty.layers_done() == 0


def test_overwrite_keeps_a_store_of_the_same_analysis(loaded: LoadedModel, undisturbed: Path, copy: Path) -> None:
    create_or_resume(copy, open_store(copy).identity, loaded.linears, overwrite=True)
    assert contents(copy) == contents(undisturbed)


def test_overwrite_that_is_interrupted_leaves_a_store(
    loaded: LoadedModel, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unirank.store.write_json", interrupted)  # after the old layers went
        with pytest.raises(KeyboardInterrupt):
            create_or_resume(copy, {"scheme": "other"}, loaded.linears, overwrite=True)
    assert (copy / MANIFEST).is_file()
    assert create_or_resume(copy, {"scheme": "other"}, loaded.linears, overwrite=True).layers_done() == 0


# -- damage -----------------------------------------------------------------------------------------------------------


def test_unfinished_store_is_refused_by_plan(copy: Path) -> None:
    (copy / f"layer-{LAYERS - 1:04d}.safetensors").unlink()
    with pytest.raises(unirank.StoreError, match=rf"not finished: {LAYERS - 1} of {LAYERS} layers"):
        unirank.plan(open_store(copy), 0.2)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_layer_file_is_named(keep: float, copy: Path) -> None:
    file = copy / "layer-0003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(unirank.StoreError, match=r"layer-0003\.safetensors is missing or damaged"):
        unirank.plan(open_store(copy), 0.2)
    store = open_store(copy)
    spec = next(spec for spec in store.linears if spec.layer == 3)
    with pytest.raises(unirank.StoreError, match=r"layer-0003\.safetensors is missing or damaged"):
        store.factors(spec, 1)


def flip(file: Path, position: int) -> None:
    """Change one bit of the byte at `position`, counted from the end."""
    data = bytearray(file.read_bytes())
    data[-position] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("position", [1, 100, 5000])
def test_flipped_bit_is_found_and_its_tensor_named(position: int, copy: Path) -> None:
    file = copy / "layer-0002.safetensors"
    flip(file, position)
    store = open_store(copy)
    seen = []
    for spec in store.linears:
        try:
            store.factors(spec, 1)
            store.energies()
        except unirank.StoreError as error:
            seen.append(str(error))
    assert seen
    assert all("layer-0002.safetensors is missing or damaged (model.layers.2." in text for text in seen)
    assert all("has other bytes than were written" in text for text in seen)


def test_flipped_bit_in_a_stream_stops_the_run_that_would_go_on(
    harmed: tuple[Path, str], loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(harmed[0] / "full-disk", tmp_path / "store"))
    flip(store / "stream-0002.safetensors", 50)
    with pytest.raises(unirank.StoreError, match=r"stream-0002\.safetensors is missing or damaged .*other bytes"):
        unirank.analyze(loaded, store, calibration=settings)


def test_two_runs_on_one_store_are_refused(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    held = tmp_path / "store"
    code = "import sys; from pathlib import Path; from unirank.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(unirank.InputError, match="Another run is at work in"):
            unirank.analyze(loaded, held, calibration=settings)
        other.kill()
    unirank.analyze(loaded, held, calibration=settings)  # the lock went with its process
    assert contents(held) == contents(undisturbed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 99}', b"\xff\xfe", None])
def test_damaged_manifest_is_named_and_overwrite_replaces_it(
    content: bytes | None, loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, copy: Path
) -> None:
    file = copy / MANIFEST
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(unirank.StoreError, match=r"analysis\.json is missing or damaged"):
        open_store(copy)
    with pytest.raises(unirank.StoreError, match=r"analysis\.json is missing or damaged"):
        unirank.analyze(loaded, copy, calibration=settings)
    unirank.analyze(loaded, copy, calibration=settings, overwrite=True)
    assert contents(copy) == contents(undisturbed)


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


@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_that_is_no_store_is_refused_and_untouched(
    overwrite: bool, loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    (tmp_path / "layer-0000.safetensors").write_bytes(b"somebody's")
    before = contents(tmp_path)
    with pytest.raises(unirank.InputError, match=r"was not made by unirank \(it has no analysis\.json\)"):
        unirank.analyze(loaded, tmp_path, calibration=settings, overwrite=overwrite)
    assert contents(tmp_path) == before
    with pytest.raises(unirank.StoreError, match="is not an analysis store"):
        open_store(tmp_path)


def test_file_in_the_place_of_the_store_is_refused_and_untouched(
    loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    (tmp_path / "store").write_bytes(b"somebody's")
    for path in (tmp_path / "store", tmp_path / "store" / "below"):
        with pytest.raises(unirank.InputError, match="is not a directory"):
            unirank.analyze(loaded, path, calibration=settings)
    assert (tmp_path / "store").read_bytes() == b"somebody's"
