"""`Calibration.precision`: a decomposition in float32 where asked, never mixed with one in float64."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import unirank
from tests.support.command_line import Run
from tests.support.tiny import build
from unirank.analysis.calibration import texts_of, windows_of
from unirank.analysis.deficient import deficient
from unirank.analysis.scheme import scheme
from unirank.analysis.scheme.base import Problem
from unirank.layerwise.recording import record
from unirank.layerwise.statistics import calibrate_layer
from unirank.models.structure import weight_of
from unirank.types import Moment


@pytest.fixture
def single(calibration: unirank.Calibration) -> unirank.Calibration:
    return dataclasses.replace(calibration, precision="float32")


def test_a_store_knows_its_precision_and_is_not_mixed_with_another(
    make_model, calibration, single, tmp_path: Path
) -> None:
    loaded = make_model()
    double = unirank.analyze(loaded, tmp_path / "double", calibration=calibration)
    found = unirank.analyze(loaded, tmp_path / "single", calibration=single)
    assert "precision" not in json.loads((tmp_path / "double" / "analysis.json").read_text())["identity"]["calibration"]
    assert found.identity.calibration.precision == "float32"
    assert unirank.open_store(found.path).identity == found.identity
    assert found.digest != double.digest
    for name, energies in double.energies().items():
        assert found.energies()[name].dtype == torch.float64
        torch.testing.assert_close(found.energies()[name], energies, rtol=0, atol=1e-5 * float(energies[0]))
        assert not torch.equal(found.energies()[name], energies)
    with pytest.raises(unirank.StoreError, match=r"calibration\.precision \(store: None, now: 'float32'\)"):
        unirank.analyze(loaded, double.path, calibration=single)
    with pytest.raises(unirank.StoreError, match=r"calibration\.precision \(store: 'float32', now: None\)"):
        unirank.analyze(loaded, found.path, calibration=calibration)


def test_gradients_are_the_same_in_both(make_model, calibration, single, tmp_path: Path) -> None:
    loaded = make_model()
    source = unirank.analyze(loaded, tmp_path / "a", scheme="kfac", calibration=calibration)
    taken = unirank.analyze(loaded, tmp_path / "b", scheme="kfac", calibration=single, gradients_from=source.path)
    assert taken.complete
    assert all(curvature.dtype == torch.float64 for curvature in taken.curvatures().values())


def test_the_command_asks_for_it_and_what_is_missing_is_asked_for_in_it(
    run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = ["--calib", text_file, "--windows", 4, "--window", 24, "--precision", "float32", "--no-keep-hidden"]
    code, printed, _ = run_unirank("analyze", model_dir, "-o", tmp_path / "s", *asked, "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(printed)["identity"]["calibration"]["precision"] == "float32"
    code, _, told = run_unirank("plan", tmp_path / "s", "-r", "0.2", "--preset", "best")
    assert code == 3
    assert "--precision float32" in told


def test_another_precision_is_refused() -> None:
    with pytest.raises(unirank.InputError, match=r"Calibration\.precision = 'float16' .* float64 or float32"):
        unirank.Calibration(precision="float16")


def test_rounding_of_float32_is_no_sign_of_too_few_directions(tokenizer, calibration, tmp_path: Path) -> None:
    """In float32 eigenvalues below its resolution come out negative, as those of a deficient moment do."""
    model = build("llama", num_hidden_layers=1)
    model.model.embed_tokens.weight.data[:, :4] *= 1e5
    loaded = unirank.describe(model, tokenizer, source="tiny")
    many = dataclasses.replace(calibration, windows=32, window=32, clip=0.0)
    store = unirank.analyze(loaded, tmp_path / "s", calibration=dataclasses.replace(many, precision="float32"))
    assert any(bool((energies == 0).any()) for energies in store.energies().values())
    assert deficient(store) == ()


@pytest.mark.smollm2
def test_on_real_weights_it_costs_what_the_page_says(smollm2: str) -> None:
    """docs/numerics.md: the first layer is the worst, by the condition of what leaves its attention."""
    loaded = unirank.load(smollm2, dtype="float32", device="cpu")
    calibration = unirank.Calibration(windows=4, window=512, batch=4)
    recording = record(loaded, windows_of(loaded, texts_of(loaded, calibration), calibration), batch=4)
    stats = calibrate_layer(loaded, 0, recording, recording.start, clip=2.0)
    spec = next(spec for spec in loaded.linears if spec.kind == "self_attn.o_proj")
    weight, moment = weight_of(loaded.model.get_submodule(spec.name)).detach(), stats.moments[stats.input_of[spec.name]]
    rounded = Moment(moment.c.float(), moment.mean.float(), moment.tokens)
    (double,) = scheme("whiten").decompose([Problem("o", weight, moment, spec.k)])
    (single,) = scheme("whiten").decompose([Problem("o", weight, rounded, spec.k, work=torch.float32)])
    weight, lost = weight.double(), []
    for factors in (double, single):
        rank = int(0.8 * spec.max_rank)
        rest = weight - factors.left[:, :rank].double() @ factors.right[:rank].double()
        lost.append(float(((rest @ moment.c) * rest).sum()))
    total = float(((weight @ moment.c) * weight).sum())
    assert 1e-9 < (lost[1] - lost[0]) / total < 1e-5
    assert lost[1] / lost[0] < 1.2
