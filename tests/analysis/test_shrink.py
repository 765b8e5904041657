"""`Calibration.shrink`: what it makes of a moment, of what few tokens show, of the second pass, and of a store."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.models import OptionInfo

import unirank
from tests.support.command_line import Run
from tests.support.stores import contents
from unirank.analysis.calibration import settled
from unirank.analysis.deficient import deficient
from unirank.analysis.manifest import MANIFEST
from unirank.analysis.scheme import scheme as scheme_of
from unirank.analysis.scheme.base import SHRINK
from unirank.analysis.store import open_store
from unirank.cli import options
from unirank.compression.card import calibration_line
from unirank.compression.second_fit import Pair, Refine
from unirank.demands import require
from unirank.layerwise.shrinkage import shrink_, shrink_all, shrink_cross_
from unirank.recipes import preset
from unirank.types import LoadedModel, Moment

LAYERS = 3


@pytest.fixture(scope="module")
def settings(text_file: Path) -> unirank.Calibration:
    return unirank.Calibration(text=str(text_file), windows=6, window=24, seed=0, batch=2, shrink=0)


def samples(tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixing + mixing[0]


def moment_of(x: torch.Tensor) -> Moment:
    return Moment(x.T @ x / len(x), x.mean(0), len(x), x.abs().mean(0))


@given(st.floats(0, 1), st.integers(1, 12))
def test_it_is_the_formula_and_keeps_the_energy_of_every_channel(share: float, n: int) -> None:
    moment = moment_of(samples(40, n))
    mean = torch.outer(moment.mean, moment.mean)
    covariance = moment.c - mean
    found = shrink_all({"x": moment}, share)["x"]
    wanted = (1 - share) * covariance + share * torch.diag(covariance.diagonal()) + mean
    torch.testing.assert_close(found.c, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))
    assert torch.equal(found.c.diagonal(), moment.c.diagonal())
    assert torch.equal(found.c, found.c.T)
    assert (found.mean is moment.mean, found.mean_abs is moment.mean_abs) == (True, True)


def test_one_moment_under_two_names_is_shrunk_once_and_the_given_one_stays() -> None:
    moment = moment_of(samples(40, 5))
    before = moment.c.clone()
    found = shrink_all({"a": moment, "b": moment}, 0.5)
    assert torch.equal(found["a"].c, found["b"].c)
    assert not torch.equal(found["a"].c, before)
    assert torch.equal(moment.c, before)
    assert shrink_all({"a": moment}, 0.0)["a"] is moment


def test_a_cross_moment_is_drawn_to_what_its_means_say() -> None:
    x, y = samples(40, 4), samples(40, 4, seed=1)
    cross, means = x.T @ y / 40, torch.outer(x.mean(0), y.mean(0))
    found = cross.clone()
    shrink_cross_(found, x.mean(0), y.mean(0), 0.25)
    torch.testing.assert_close(found, 0.75 * cross + 0.25 * means)


def test_few_tokens_come_nearer_to_the_truth() -> None:
    """Channels that have nothing to do with each other, and fewer tokens than channels: chance alone ties them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    truth = torch.eye(30, dtype=torch.float64)
    plain = x.T @ x / len(x)
    found = plain.clone()
    shrink_(found, x.mean(0), 0.3)
    assert (found - truth).norm() < 0.8 * (plain - truth).norm()
    assert torch.linalg.matrix_rank(plain) < torch.linalg.matrix_rank(found) == 30


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_second_pass_solves_the_shrunk_equations(share: float, *, centred: bool) -> None:
    dense, own = samples(60, 5), samples(60, 5, seed=1)
    pair = Pair.zeros(5, dense.device)
    pair.add(dense.float(), own.float())
    settings = Refine(mix=0.7, damping=1e-9, centred=centred, shrink=share)
    found = pair.equations(settings, centred=centred)
    mean, other = own.mean(0), dense.mean(0)
    covariance = own.T @ own / 60 - torch.outer(mean, mean)
    moved = (dense - own).T @ own / 60 - torch.outer(other - mean, mean)
    base, shift = torch.outer(mean, mean), torch.outer(other - mean, mean)
    if centred:
        base, shift = torch.zeros_like(base), torch.zeros_like(shift)
    shrunk = (1 - share) * covariance + share * torch.diag(covariance.diagonal()) + base
    assert found.factor is not None
    scale = float(shrunk.abs().max())
    torch.testing.assert_close(found.factor @ found.factor.T, shrunk, rtol=0, atol=1e-5 * scale)
    wanted = shrunk + 0.7 * ((1 - share) * moved + shift)
    torch.testing.assert_close(found.aim, wanted, rtol=0, atol=1e-5 * scale)
    nearer = (found.aim - found.factor @ found.factor.T).abs().max() <= 1e-12 * scale
    assert bool(nearer) == (centred and share == 1)  # then the best map is the dense weight


@pytest.mark.parametrize("scheme", ["whiten", "afm", "asvd", "kfac", "svd"])
def test_every_scheme_with_a_second_moment_sees_it(
    scheme: str, loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    plain, shrunk = (
        unirank.analyze(
            loaded, tmp_path / str(shrink), calibration=dataclasses.replace(settings, shrink=shrink), scheme=scheme
        ).energies()
        for shrink in (0, 0.5)
    )
    changed = [name for name in plain if not torch.equal(plain[name], shrunk[name])]
    assert bool(changed) == (scheme in ("whiten", "afm", "kfac"))


def test_it_is_recorded_gone_on_with_and_never_mixed(
    loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    asked = dataclasses.replace(settings, shrink=0.25)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=asked)
    assert json.loads((store.path / MANIFEST).read_text())["identity"]["calibration"]["shrink"] == 0.25
    again = tmp_path / "again"
    shutil.copytree(store.path, again)
    open_store(again).layer_file(LAYERS - 1).unlink()
    before = contents(again)
    with pytest.raises(unirank.StoreError, match=r"differs in calibration\.shrink \(store: 0\.25, now: None\)"):
        unirank.analyze(loaded, again, calibration=settings)
    assert contents(again) == before
    unirank.analyze(loaded, again, calibration=dataclasses.replace(settings, shrink=None))
    assert contents(again) == contents(store.path)
    line = calibration_line(store.identity)
    assert "covariances shrunk by 0.25" in line
    with pytest.raises(unirank.StoreError, match=r"--shrink 0\.25"):
        require(store, preset("fast"))


def test_off_is_not_recorded_so_that_a_store_stays_what_it_was(undisturbed: Path) -> None:
    assert "shrink" not in json.loads((undisturbed / MANIFEST).read_text())["identity"]["calibration"]


def test_a_store_with_a_share_that_is_not_legal_is_damaged(undisturbed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(undisturbed, store)
    manifest = store / MANIFEST
    record = json.loads(manifest.read_text())
    record["identity"]["calibration"]["shrink"] = 2.5
    manifest.write_text(json.dumps(record))
    with pytest.raises(unirank.StoreError, match=r"calibration\.shrink is 2\.5"):
        open_store(store)


@pytest.mark.parametrize("shrink", [-0.1, 1.5, float("nan"), "0.1", True])
def test_a_share_that_is_not_legal_is_named(shrink: Any) -> None:
    with pytest.raises(unirank.InputError, match=r"Calibration\.shrink = .* is not legal; it is a number from 0"):
        unirank.Calibration(shrink=shrink)


def test_what_is_said_goes_first(settings: unirank.Calibration, undisturbed: Path) -> None:
    unsaid, said = (dataclasses.replace(settings, shrink=shrink) for shrink in (None, 0.75))
    store, afm, whiten = open_store(undisturbed), scheme_of("afm"), scheme_of("whiten")
    assert (settled(unsaid, afm).shrink, settled(unsaid, whiten).shrink) == (0.1, 0.0)
    assert settled(unsaid, afm, source=store).shrink == 0.1  # whose gradients are taken says nothing about it
    assert settled(unsaid, afm, store).shrink == 0.0
    assert settled(said, afm, store, store).shrink == 0.75


@pytest.mark.parametrize(("scheme", "share"), [("whiten", None), ("afm", 0.1), ("kfac", 0.1), ("svd", None)])
def test_the_default_is_the_schemes(
    scheme: str, share: float | None, loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    calibration = dataclasses.replace(settings, shrink=None)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration, scheme=scheme)
    assert store.identity.calibration.shrink == share


def test_gradients_are_shared_whatever_the_share(loaded: LoadedModel, settings, tmp_path: Path) -> None:
    plain = dataclasses.replace(settings, gradient_windows=4)
    source = unirank.analyze(loaded, tmp_path / "source", calibration=plain)
    asked = dataclasses.replace(settings, shrink=0.5)
    more = {"scheme": "kfac", "gradients_from": source.path}
    store = unirank.analyze(loaded, tmp_path / "store", calibration=asked, **more)
    assert store.identity.calibration.shrink == 0.5
    for layer in range(LAYERS):
        file = f"gradient-{layer:04d}.safetensors"
        assert (store.path / file).read_bytes() == (source.path / file).read_bytes()


def test_every_direction_has_energy_so_none_is_said_to_be_missing(
    loaded: LoadedModel, settings: unirank.Calibration, tmp_path: Path
) -> None:
    few = dataclasses.replace(settings, windows=1, window=8)
    with pytest.warns(unirank.UnirankWarning, match="Only 8 tokens"):
        plain = unirank.analyze(loaded, tmp_path / "plain", calibration=few)
    with pytest.warns(unirank.UnirankWarning, match="Only 8 tokens"):
        shrunk = unirank.analyze(loaded, tmp_path / "few", calibration=dataclasses.replace(few, shrink=0.1))
    assert len(deficient(plain)) > len(deficient(shrunk)) == 0


@pytest.mark.parametrize("shrink", [-0.1, 1.5, float("nan")])
def test_a_share_of_the_second_pass_that_is_not_legal_is_named(shrink: float) -> None:
    with pytest.raises(unirank.InputError, match=r"shrink = .* is not legal; it lies between 0 and 1"):
        Refine(shrink=shrink)


def test_the_command_takes_it(model_dir: Path, text_file: Path, tmp_path: Path, run_unirank: Run) -> None:
    small = ["--calib", text_file, "--windows", 6, "--window", 24, "--batch", 2]
    code, _, err = run_unirank("analyze", model_dir, "-o", tmp_path / "store", *small, "--shrink", 0.1)
    assert (code, err) == (0, "")
    assert open_store(tmp_path / "store").identity.calibration.shrink == 0.1
    out = ["--remove", 0.3, "-o", tmp_path / "out", *small]
    code, _, err = run_unirank("compress", model_dir, *out, "--refine", 0.5, "--refine-shrink", 0.75)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "rank_plan.json").read_text())["settings"]["refine"]["shrink"] == 0.75
    code, _, err = run_unirank("compress", model_dir, *out, "--overwrite", "--shrink", 2)
    assert code == 2
    assert "--shrink = 2.0 is not legal" in err


def test_help_says_the_defaults() -> None:
    shrink, refine = (
        str(option.help)
        for kind in (options.Shrink, options.RefineShrink)
        for option in get_args(kind)
        if isinstance(option, OptionInfo)
    )
    assert f"Default: {SHRINK:g} with afm and kfac, else 0;" in shrink
    assert f"Default: {Refine().shrink:g}." in refine
