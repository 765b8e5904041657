"""`Calibration.clip` in the identity of a store: recorded, gone on with where nothing is said, and never mixed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.models import OptionInfo

import unirank
from tests.support.stores import contents
from unirank.analysis import calibration as module
from unirank.analysis.calibration import settled
from unirank.analysis.manifest import MANIFEST
from unirank.analysis.needs import dry_run
from unirank.analysis.redraw import redrawn_windows
from unirank.analysis.scheme import scheme
from unirank.analysis.store import open_store
from unirank.cli import options
from unirank.compression.second_fit import Pair
from unirank.types import LoadedModel

LAYERS = 3
WHITEN = scheme("whiten")
DEFAULT = module.CLIP  # before a fixture puts another one in its place


@pytest.fixture(scope="module")
def settings(text_file: Path) -> unirank.Calibration:
    return unirank.Calibration(text=str(text_file), windows=6, window=24, seed=0, batch=2, clip=0)


@pytest.fixture(autouse=True)
def default(monkeypatch: pytest.MonkeyPatch) -> float:
    """A default that clips the random inputs of a tiny model."""
    monkeypatch.setattr(module, "CLIP", 1.25)
    return 1.25


def unsaid(settings: unirank.Calibration) -> unirank.Calibration:
    return dataclasses.replace(settings, clip=None)


def analyzed(loaded: LoadedModel, place: Path, calibration: Any, **more: Any) -> unirank.AnalysisStore:
    return unirank.analyze(loaded, place, calibration=calibration, **more)


def recorded(place: Path) -> dict[str, Any]:
    return json.loads((place / MANIFEST).read_text())["identity"]["calibration"]


def unfinished(place: Path, to: Path) -> Path:
    """A copy of a store without its last layer."""
    shutil.copytree(place, to)
    open_store(to).layer_file(LAYERS - 1).unlink()
    return to


@pytest.mark.parametrize("scheme", ["whiten", "afm", "asvd", "awsvd", "kfac", "fwsvd"])
def test_every_scheme_that_reads_inputs_sees_the_clipped_ones(
    scheme: str, loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    found = [
        analyzed(loaded, tmp_path / str(clip), dataclasses.replace(settings, clip=clip), scheme=scheme)
        for clip in (0, 1.25, 1e6)
    ]
    plain, clip, nothing = (store.energies() for store in found)
    assert all(torch.equal(plain[name], nothing[name]) for name in plain)  # nothing is that long
    changed = [name for name in plain if not torch.equal(plain[name], clip[name])]
    assert bool(changed) == (scheme != "fwsvd")  # its scales are of gradients alone


def test_off_is_not_recorded_so_that_a_store_stays_what_it_was(undisturbed: Path) -> None:
    assert "clip" not in recorded(undisturbed)


def test_help_says_the_default() -> None:
    (option,) = [one for one in get_args(options.Clip) if isinstance(one, OptionInfo)]
    assert f"0 is off. Default: {DEFAULT:g}," in str(option.help)


def test_the_default_is_recorded(loaded: LoadedModel, settings, default: float, tmp_path: Path) -> None:
    store = analyzed(loaded, tmp_path / "store", unsaid(settings))
    assert recorded(store.path)["clip"] == default
    assert open_store(store.path).identity.calibration.clip == default
    assert open_store(store.path).digest == store.digest


def test_who_says_nothing_goes_on_with_what_the_store_has(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, tmp_path: Path
) -> None:
    """An unfinished store from before there was clipping is finished as it was begun, and so is a newer one."""
    old = unfinished(undisturbed, tmp_path / "old")
    assert analyzed(loaded, old, unsaid(settings)).complete
    assert contents(old) == contents(undisturbed)
    new = analyzed(loaded, tmp_path / "new", dataclasses.replace(settings, clip=3)).path
    again = unfinished(new, tmp_path / "again")
    assert analyzed(loaded, again, unsaid(settings)).identity.calibration.clip == 3
    assert contents(again) == contents(new)


@pytest.mark.parametrize("clip", [2, 2.0])
def test_who_says_another_clip_is_refused(clip: float, loaded: LoadedModel, settings, undisturbed, tmp_path) -> None:
    store = unfinished(undisturbed, tmp_path / "store")
    before = contents(store)
    with pytest.raises(unirank.StoreError, match=r"differs in calibration\.clip \(store: None, now: 2\.0\)"):
        analyzed(loaded, store, dataclasses.replace(settings, clip=clip))
    assert contents(store) == before


def test_overwrite_keeps_the_same_analysis_and_takes_the_default_for_another(
    loaded: LoadedModel, settings: unirank.Calibration, undisturbed: Path, default: float, tmp_path: Path
) -> None:
    store = unfinished(undisturbed, tmp_path / "store")
    analyzed(loaded, store, unsaid(settings), overwrite=True)
    assert contents(store) == contents(undisturbed)
    other = dataclasses.replace(unsaid(settings), seed=1)
    assert analyzed(loaded, store, other, overwrite=True).identity.calibration.clip == default
    (store / MANIFEST).write_text("{")
    assert analyzed(loaded, store, unsaid(settings), overwrite=True).identity.calibration.clip == default


def test_a_finished_store_is_compressed_with_as_it_is(loaded: LoadedModel, undisturbed: Path, text_file: Path) -> None:
    before = contents(undisturbed)
    for calibration in (None, text_file):
        found = unirank.compress(loaded, 0.3, store=undisturbed, calibration=calibration, copy=True)
        assert found.identity.calibration.clip is None
    assert contents(undisturbed) == before


def test_gradients_are_shared_whatever_the_clip(loaded: LoadedModel, settings, tmp_path: Path) -> None:
    """They do not depend on it. Who says nothing about clipping takes the source's."""
    plain = dataclasses.replace(settings, gradient_windows=4)
    source = analyzed(loaded, tmp_path / "source", plain)
    taken = {}
    for name, asked in (("same", unsaid(settings)), ("other", dataclasses.replace(settings, clip=1.25))):
        store = analyzed(loaded, tmp_path / name, asked, scheme="kfac", gradients_from=source.path)
        taken[name] = store.identity.calibration.clip
        for layer in range(LAYERS):
            file = f"gradient-{layer:04d}.safetensors"
            assert (store.path / file).read_bytes() == (source.path / file).read_bytes()
    assert taken == {"same": None, "other": 1.25}


@pytest.mark.parametrize("clip", [-1, 0.5, float("nan"), float("inf"), "2", True])
def test_a_clip_that_is_not_legal_is_named(clip: Any, text_file: Path) -> None:
    with pytest.raises(unirank.InputError, match=r"Calibration\.clip = .* is not legal; it is 0, for off, or a number"):
        unirank.Calibration(text=str(text_file), clip=clip)


def test_what_is_said_goes_first(settings: unirank.Calibration, undisturbed: Path, default: float) -> None:
    store = open_store(undisturbed)
    assert settled(unsaid(settings), WHITEN).clip == default
    assert settled(unsaid(settings), WHITEN, None, store).clip == 0
    assert settled(dataclasses.replace(settings, clip=4), WHITEN, store).clip == 4


def test_windows_are_redrawn_and_a_dry_run_runs(
    loaded: LoadedModel, settings: unirank.Calibration, text_file: Path, tmp_path: Path
) -> None:
    calibration = dataclasses.replace(settings, clip=2)
    store = analyzed(loaded, tmp_path / "store", calibration)
    assert redrawn_windows(loaded, store, text=str(text_file)).shape == (6, 24)
    assert dry_run(loaded, tmp_path / "nowhere", calibration=calibration).layers == LAYERS


@pytest.mark.parametrize("clip", [0.0, 1.25])
def test_the_second_pass_takes_the_clip_of_the_store(
    clip: float, loaded: LoadedModel, settings, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = analyzed(loaded, tmp_path / "store", dataclasses.replace(settings, clip=clip))
    original, seen = Pair.add, set()

    def watched(pair: Pair, dense: torch.Tensor, own: torch.Tensor) -> None:
        seen.add(pair.clip)
        original(pair, dense, own)

    monkeypatch.setattr(Pair, "add", watched)
    found = unirank.compress(loaded, 0.3, store=store.path, calibration=text_file, refine=unirank.Refine(), copy=True)
    assert seen == {clip}
    assert found.identity.calibration.clip == (clip or None)
