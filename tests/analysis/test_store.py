"""The analysis store: whole or resumable, equal for equal inputs, and never mistaken for another's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import unirank
from tests.support.stores import contents, flip
from tests.support.tiny import build, made_up_identity
from unirank.analysis.store import MANIFEST, create_or_resume, open_store
from unirank.disk.tensorfile import read_tensors, write_tensors
from unirank.layerwise.recording import Streams
from unirank.types import CosineStat, Factors, LinearSpec, LoadedModel

LAYERS = 5
BAD_STATS = (
    {},
    {"tokens": 0},
    {"tokens": "1"},
    {"tokens": 2.5},
    {"tokens": 1, "total": "1"},
    {"tokens": 1, "other": 1},
)


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
    store = create_or_resume(tmp_path, made_up_identity(), loaded.linears)
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
    change: Callable, named: list[str], loaded: LoadedModel, settings: unirank.Calibration, copied: Path, tmp_path: Path
) -> None:
    model, calibration, scheme = change(loaded, settings, tmp_path)
    before = contents(copied)
    with pytest.raises(unirank.StoreError, match="belongs to another analysis") as caught:
        unirank.analyze(model, copied, scheme=scheme, calibration=calibration)
    assert all(name in str(caught.value) for name in named)
    assert contents(copied) == before


def test_overwrite_replaces_a_store_of_another_analysis(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, copied: Path
) -> None:
    (copied / "notes.txt").write_text("mine", encoding="utf-8")
    other = dataclasses.replace(settings, seed=1)
    store = unirank.analyze(loaded, copied, calibration=other, overwrite=True)
    assert store.identity.calibration.seed == 1
    assert (copied / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert contents(copied).keys() - {"notes.txt"} == contents(undisturbed).keys()
    assert contents(copied)["layer-0000.safetensors"] != contents(undisturbed)["layer-0000.safetensors"]
    empty = create_or_resume(copied, made_up_identity("other"), loaded.linears, overwrite=True)
    assert empty.layers_done() == 0


def test_overwrite_keeps_a_store_of_the_same_analysis(loaded: LoadedModel, undisturbed: Path, copied: Path) -> None:
    create_or_resume(copied, open_store(copied).identity, loaded.linears, overwrite=True)
    assert contents(copied) == contents(undisturbed)


def test_overwrite_that_is_interrupted_leaves_a_store(
    loaded: LoadedModel, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("unirank.analysis.manifest.write_json", interrupted)  # after the old layers went
        with pytest.raises(KeyboardInterrupt):
            create_or_resume(copied, made_up_identity("other"), loaded.linears, overwrite=True)
    assert (copied / MANIFEST).is_file()
    assert create_or_resume(copied, made_up_identity("other"), loaded.linears, overwrite=True).layers_done() == 0


# -- damage -----------------------------------------------------------------------------------------------------------


def test_unfinished_store_is_refused_by_plan(copied: Path) -> None:
    (copied / f"layer-{LAYERS - 1:04d}.safetensors").unlink()
    with pytest.raises(unirank.StoreError, match=rf"not finished: {LAYERS - 1} of {LAYERS} layers"):
        unirank.plan(open_store(copied), 0.2)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_layer_file_is_named(keep: float, copied: Path) -> None:
    file = copied / "layer-0003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(unirank.StoreError, match=r"layer-0003\.safetensors is missing or damaged"):
        unirank.plan(open_store(copied), 0.2)
    store = open_store(copied)
    spec = next(spec for spec in store.linears if spec.layer == 3)
    with pytest.raises(unirank.StoreError, match=r"layer-0003\.safetensors is missing or damaged"):
        store.factors(spec, 1)


def test_a_changed_number_in_the_header_is_found(copied: Path) -> None:
    file = copied / "layer-0001.safetensors"
    data = file.read_bytes()
    place = data.index(b"total_of_squares") + data[data.index(b"total_of_squares") :].index(b".") + 1
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])  # one digit of a cosine's sum
    with pytest.raises(unirank.StoreError, match=r"layer-0001\.safetensors .*its header has other values"):
        unirank.plan(open_store(copied), 0.2)


@pytest.mark.parametrize(
    "cosines",
    [
        None,
        [],
        {"mlp": 1},
        {"mlp": {}},
        *({"mlp": {"total": 1.0, "total_of_squares": 1.0} | more} for more in BAD_STATS),
    ],
)
def test_a_header_that_no_analysis_writes_is_refused(cosines: object, copied: Path) -> None:
    """Also where its checksum is right."""
    file = copied / "layer-0001.safetensors"
    write_tensors(file, read_tensors(file), {"cosines": cosines, "damping": cosines})
    store = open_store(copied)
    with pytest.raises(unirank.StoreError, match=r"layer-0001\.safetensors is missing or damaged"):
        unirank.plan(store, 0.2)


@pytest.mark.parametrize("position", [1, 100, 5000])
def test_flipped_bit_is_found_and_its_tensor_named(position: int, copied: Path) -> None:
    file = copied / "layer-0002.safetensors"
    flip(file, position)
    store = open_store(copied)
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


def test_two_runs_on_one_store_are_refused(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    held = tmp_path / "store"
    code = "import sys; from pathlib import Path; from unirank.disk.files import locked\n"
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
    content: bytes | None, loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, copied: Path
) -> None:
    file = copied / MANIFEST
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(unirank.StoreError, match=r"analysis\.json is missing or damaged"):
        open_store(copied)
    with pytest.raises(unirank.StoreError, match=r"analysis\.json is missing or damaged"):
        unirank.analyze(loaded, copied, calibration=settings)
    unirank.analyze(loaded, copied, calibration=settings, overwrite=True)
    assert contents(copied) == contents(undisturbed)


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
