"""What an older version wrote still serves: its store opens, plans, is applied and resumed; its checkpoint loads.

`tests/data/0.1.0-before-rooms` was written by the version before the package was moved into rooms: a dense model, a
store of format 3 (with gradients, and what `lems` measured), a checkpoint made from it, the text, and what came out.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import unirank
from tests.support.stores import contents
from unirank.analysis.identity import weights_hash
from unirank.analysis.store import MANIFEST, AnalysisStore, open_store
from unirank.models.low_rank import LowRankLinear
from unirank.types import DENSE, LoadedModel

PLACE = Path(__file__).parents[1] / "data" / "0.1.0-before-rooms"
WORDS = PLACE / "words.txt"
EXPECTED: dict[str, Any] = json.loads((PLACE / "expected.json").read_text())
CALIBRATION = unirank.Calibration(text=str(WORDS), windows=6, window=24, batch=2, gradient_windows=4)
CLOSE = 1e-4  # other machines round differently
IDS = torch.arange(2, 30)[None]


@pytest.fixture
def loaded() -> LoadedModel:
    return unirank.load(PLACE / "model", device="cpu")


@pytest.fixture
def store(tmp_path: Path) -> AnalysisStore:
    """The old store, where it may be written to."""
    return open_store(shutil.copytree(PLACE / "store", tmp_path / "store"))


@pytest.fixture
def same_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are part of an identity: here those of today are said to be those of then."""
    then = dict(open_store(PLACE / "store").identity.versions)
    monkeypatch.setattr("unirank.analysis.identity.versions", lambda: then)
    # transformers writes its version into every config, whose hash is part of an identity too.
    monkeypatch.setattr("transformers.configuration_utils.__version__", then["transformers"])


def last_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits[0, -1]


def plan_of_then(store: AnalysisStore) -> unirank.RankPlan:
    plan = unirank.plan(store, 0.3)
    assert plan.ranks == EXPECTED["unirank_ranks_at_0.3"]
    return plan


def test_the_store_opens_with_its_digest_and_gives_the_same_plan(store: AnalysisStore) -> None:
    assert json.loads((store.path / MANIFEST).read_text())["format"] == 3
    assert store.complete
    assert store.digest == EXPECTED["digest"]
    assert store.identity.as_dict() == json.loads((store.path / MANIFEST).read_text())["identity"]
    assert plan_of_then(store).analysis == EXPECTED["digest"]


def test_the_plan_is_applied_to_the_model(store: AnalysisStore, loaded: LoadedModel) -> None:
    """The model is known again by the kind of hash that the store has."""
    plan = plan_of_then(store)
    report = unirank.truncate(loaded, store, plan)
    assert report.targets_after == plan.used
    for spec in store.linears:
        module = loaded.model.get_submodule(spec.name)
        rank = plan.ranks[spec.name]
        assert isinstance(module, LowRankLinear) == (rank != DENSE)
        if isinstance(module, LowRankLinear):
            left, right = store.factors(spec, module.rank)
            assert module.rank == rank
            assert torch.equal(module.left.weight, left)
            assert torch.equal(module.right.weight, right)
    assert last_logits(loaded.model).isfinite().all()


def test_another_model_is_told_apart(store: AnalysisStore, loaded: LoadedModel) -> None:
    loaded.model.state_dict()["model.norm.weight"][0] += 1
    with pytest.raises(unirank.InputError, match="made from another model"):
        unirank.truncate(loaded, store, plan_of_then(store))


def test_gradients_are_read(store: AnalysisStore) -> None:
    assert store.has_gradients
    for layer in range(store.layer_count):
        gradients = store.gradients(layer)
        assert gradients.keys() == {spec.name for spec in store.linears if spec.layer == layer}
        for spec in store.linears:
            if spec.layer == layer:
                assert gradients[spec.name].weight.shape == (spec.m, spec.n)
                assert gradients[spec.name].g.any()
    assert all(curvature.any() for curvature in store.curvatures().values())


def test_what_was_measured_is_not_measured_again(
    store: AnalysisStore, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unirank.planning.allocator.probing.divergences", None)  # calling it fails
    workbench = unirank.make_workbench(loaded, store, text=str(WORDS))
    before = contents(store.path)
    plan = unirank.plan(store, 0.3, allocator="lems", workbench=workbench)
    made = unirank.RankPlan.from_json((PLACE / "checkpoint" / "rank_plan.json").read_text())
    assert plan.ranks == made.ranks
    assert plan.settings["kl"] == made.settings["kl"]
    assert contents(store.path) == before


def test_an_unfinished_store_is_resumed(store: AnalysisStore, loaded: LoadedModel, same_versions: None) -> None:
    store.layer_file(1).unlink()
    kept = {name: data for name, data in contents(store.path).items() if name != store.layer_file(1).name}
    times = {name: (store.path / name).stat().st_mtime_ns for name in kept}
    done = unirank.analyze(loaded, store.path, scheme="afm", calibration=CALIBRATION)
    assert done.digest == store.digest == EXPECTED["digest"]
    assert done.complete
    assert kept.items() <= contents(store.path).items()
    assert {name: (store.path / name).stat().st_mtime_ns for name in kept} == times
    then = open_store(PLACE / "store").energies()
    for name, energy in open_store(store.path).energies().items():
        torch.testing.assert_close(energy, then[name], rtol=1e-3, atol=CLOSE * float(then[name][0]))
    plan_of_then(open_store(store.path))


def test_overwrite_keeps_a_store_of_the_same_analysis(
    store: AnalysisStore, loaded: LoadedModel, same_versions: None
) -> None:
    before = contents(store.path)
    unirank.analyze(loaded, store.path, scheme="afm", calibration=CALIBRATION, overwrite=True)
    assert contents(store.path) == before


def test_a_new_store_takes_the_gradients_of_an_old_one(
    store: AnalysisStore, loaded: LoadedModel, same_versions: None, tmp_path: Path
) -> None:
    new = unirank.analyze(loaded, tmp_path / "new", scheme="kfac", calibration=CALIBRATION, gradients_from=store.path)
    assert json.loads((new.path / MANIFEST).read_text())["format"] == 5
    assert new.identity.model.weights_sha256 == weights_hash(loaded)
    for layer in range(store.layer_count):
        name = f"gradient-{layer:04d}.safetensors"
        assert (new.path / name).read_bytes() == (store.path / name).read_bytes()


@pytest.mark.parametrize("key", ["torch", "unirank"])
def test_another_version_is_refused_and_named(
    key: str, store: AnalysisStore, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.layer_file(1).unlink()
    before = contents(store.path)
    then = dict(store.identity.versions)
    monkeypatch.setattr("unirank.analysis.identity.versions", lambda: then | {key: "99.0"})
    said = re.escape(f"differs in versions.{key} (store: '{then[key]}', now: '99.0').")
    with pytest.raises(unirank.StoreError, match=said):
        unirank.analyze(loaded, store.path, scheme="afm", calibration=CALIBRATION)
    assert contents(store.path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"calibration\.seed \(store: 0, now: 1\)"),
        ({"gradient_windows": 3}, r"calibration\.gradient_windows \(store: 4, now: 3\)"),
    ],
)
def test_another_analysis_is_refused_and_named(
    change: dict[str, Any], named: str, store: AnalysisStore, loaded: LoadedModel, same_versions: None
) -> None:
    """And nothing else is: the hash of the weights is of another kind, and no difference."""
    other = dataclasses.replace(CALIBRATION, **change)
    with pytest.raises(unirank.StoreError, match=rf"differs in {named}\."):
        unirank.analyze(loaded, store.path, scheme="afm", calibration=other)


def test_another_model_is_refused_and_named(store: AnalysisStore, loaded: LoadedModel, same_versions: None) -> None:
    loaded.model.state_dict()["model.norm.weight"][0] += 1
    with pytest.raises(unirank.StoreError, match=r"differs in model\.weights_sha256 \(store: '6ca156ac1ec3'"):
        unirank.analyze(loaded, store.path, scheme="afm", calibration=CALIBRATION)


def test_the_checkpoint_loads_densifies_and_is_as_good_as_then(tmp_path: Path) -> None:
    expected = torch.tensor(EXPECTED["logits_of_the_last_of_2_to_29"])
    plain = AutoModelForCausalLM.from_pretrained(PLACE / "checkpoint")
    torch.testing.assert_close(last_logits(plain), expected, rtol=0, atol=CLOSE)
    compressed = unirank.open_compressed(PLACE / "checkpoint", device="cpu")
    torch.testing.assert_close(last_logits(compressed.model), expected, rtol=0, atol=CLOSE)
    assert compressed.identity == open_store(PLACE / "store").identity
    assert compressed.provenance()["analysis"] == compressed.identity.as_dict()
    report = unirank.evaluate(compressed.model, compressed.tokenizer, text=str(WORDS), window=24)
    assert report.perplexity == pytest.approx(EXPECTED["perplexity"], rel=CLOSE)
    again = compressed.save(tmp_path / "again")
    assert contents(again)["provenance.json"] == contents(PLACE / "checkpoint")["provenance.json"]
    dense = unirank.densify(compressed.model)
    assert not any(isinstance(module, LowRankLinear) for module in dense.modules())
    torch.testing.assert_close(last_logits(dense), expected, rtol=0, atol=CLOSE)
