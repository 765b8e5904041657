"""The identity of a store: read as it was written, one hash of the model a process, and never an old one."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.tiny import build, made_up_identity
from unirank.analysis import identity as module
from unirank.analysis.identity import CalibrationIdentity, Identity, weights_hash
from unirank.analysis.manifest import MANIFEST
from unirank.analysis.needs import dry_run
from unirank.analysis.redraw import check_model
from unirank.analysis.store import open_store
from unirank.disk.strictjson import Damaged
from unirank.types import LoadedModel

# -- the record ---------------------------------------------------------------------------------------------------


def record() -> dict[str, Any]:
    return made_up_identity().as_dict()


def changed(path: str, *value: Any) -> dict[str, Any]:
    """The record with another value at `path`, or without it."""
    found = json.loads(json.dumps(record()))
    *parents, last = path.split(".")
    place = found
    for key in parents:
        place = place[key]
    if value:
        place[last] = value[0]
    else:
        del place[last]
    return found


@pytest.mark.parametrize(
    "read",
    [
        record(),
        record() | {"new": {"a": [1, None]}, "device": "cpu", "processes": 3},
        record() | {"device": None},
        changed("model.type", "llama"),
        changed("model.more", 7),
        changed("calibration.revision", None),
        changed("calibration.gradient_windows", 0),
        changed("calibration.clip", 2.5),
        changed("calibration.shrink", 0.5),
        changed("versions.other", "1.2"),
    ],
)
def test_a_record_is_given_back_exactly(read: dict[str, Any]) -> None:
    """So that the digest of a store stays what it was, whatever a later version knew more."""
    found = Identity.from_dict(json.loads(json.dumps(read)))
    assert found.as_dict() == read
    assert json.dumps(found.as_dict(), sort_keys=True) == json.dumps(read, sort_keys=True)
    assert Identity.from_dict(found.as_dict()) == found


def test_fields_are_read_by_name() -> None:
    found = Identity.from_dict(changed("calibration.split", "test") | {"processes": 2})
    assert (found.scheme, found.processes, found.versions["unirank"], found.device) == ("svd", 2, "0", None)
    assert (found.model.class_name, found.model.weights_sha256, found.model.config_sha256) == ("M", "abc", None)
    plain = {"text": "t", "windows_sha256": "w", "windows": 1, "window": 7, "seed": 0, "batch": 1}
    assert found.calibration == CalibrationIdentity(**plain, split="test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.scheme = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("read", "said"),
    [
        ([], "is no object"),
        (changed("scheme"), "scheme is missing"),
        (changed("scheme", 3), "scheme is '3'"),
        (changed("model"), "has no model"),
        (changed("model.class"), "model.class is missing"),
        (changed("model.weights_sha256", None), "model.weights_sha256 is 'None'"),
        (changed("model.type", 3), "model.type is '3'"),
        (changed("calibration.windows", True), "calibration.windows is 'True'"),
        (changed("calibration.batch", 0), "calibration.batch is 0"),
        (changed("calibration.window", 2.0), "calibration.window is '2.0'"),
        (changed("calibration.gradient_windows", -1), "calibration.gradient_windows is -1"),
        (changed("calibration.clip", "2"), "calibration.clip is '2'"),
        (changed("calibration.clip", 0.5), "calibration.clip is 0.5"),
        (changed("calibration.clip", float("nan")), "calibration.clip is nan"),
        (changed("calibration.shrink", 1.5), "calibration.shrink is 1.5"),
        (changed("calibration.shrink", 0.0), "calibration.shrink is 0.0"),
        (changed("versions"), "has no versions"),
        (changed("versions.unirank"), "versions.unirank is missing"),
        (changed("versions.torch", 2), "a version is no text"),
        (record() | {"processes": "two"}, "processes is 'two'"),
    ],
)
def test_what_is_missing_or_not_legal_is_named(read: Any, said: str) -> None:
    with pytest.raises(Damaged) as error:
        Identity.from_dict(read)
    assert said in str(error.value)


# -- one hash a process -----------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that a whole model is hashed from here on."""
    seen = []
    tree, serial = module.sha256_tree, module.sha256_tensors

    def counted_tree(*arguments: Any, **options: Any) -> str:
        seen.append("tree")
        return tree(*arguments, **options)

    def counted_serial(named: Any) -> str:
        named = list(named)
        seen.extend(["serial"] * (len(named) > 1))  # windows are one tensor
        return serial(named)

    monkeypatch.setattr(module, "sha256_tree", counted_tree)
    monkeypatch.setattr(module, "sha256_tensors", counted_serial)
    return seen


@pytest.mark.parametrize("preset", ["unirank", "fast"])
def test_a_compression_hashes_the_model_once(
    preset: str, make_model, calibration: unirank.Calibration, hashed: list[str]
) -> None:
    unirank.compress(make_model(), 0.3, preset=preset, calibration=calibration)
    assert hashed == ["tree"]


def test_stages_of_a_streamed_model_hash_it_once(
    model_dir: Path, calibration: unirank.Calibration, hashed: list[str], tmp_path: Path
) -> None:
    loaded = unirank.load(model_dir, device="cpu", stream=True)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    unirank.truncate(loaded, store, unirank.plan(store, 0.3))
    assert hashed == ["tree"]


WRITES: dict[str, Callable[[torch.nn.Module], object]] = {
    "in place": lambda layer: layer.weight.detach().mul_(2),  # pyright: ignore[reportCallIssue]
    "in inference mode": torch.inference_mode()(lambda layer: layer.weight[0, 0].add_(1)),  # pyright: ignore
    "through data": lambda layer: layer.weight.data[3, 4].add_(1),  # pyright: ignore
    "through numpy": lambda layer: layer.weight.detach().numpy().__setitem__((0, 0), 3.0),  # pyright: ignore
    "rows moved through data": lambda layer: layer.weight.data.copy_(layer.weight.data.flip(0)),  # pyright: ignore
    "another tensor": lambda layer: setattr(layer, "weight", torch.nn.Parameter(2 * layer.weight.detach())),  # pyright: ignore
    "another dtype": lambda layer: layer.half(),
    "loaded": lambda layer: layer.load_state_dict({"weight": torch.ones(48, 32)}),
}


@pytest.mark.parametrize("kind", ["tree:", "plain"])
@pytest.mark.parametrize("write", WRITES)
def test_a_model_that_was_written_to_is_hashed_again(write: str, kind: str, make_model, hashed: list[str]) -> None:
    loaded = make_model()
    before = weights_hash(loaded, like=kind)
    assert weights_hash(loaded, like=kind) == before
    assert len(hashed) == 1
    WRITES[write](loaded.model.get_submodule("model.layers.1.mlp.up_proj"))
    after = weights_hash(loaded, like=kind)
    assert len(hashed) == 2
    assert after != before
    assert after == weights_hash(unirank.describe(loaded.model, loaded.tokenizer), like=kind)


def test_a_buffer_or_a_bias_that_was_written_to_is_seen(make_model) -> None:
    loaded = make_model("llama-bias")
    before = weights_hash(loaded)
    loaded.model.get_submodule("model.layers.0.mlp.up_proj").bias.data[0] += 1
    assert weights_hash(loaded) != before


def test_a_copy_has_its_own_hash(make_model) -> None:
    loaded = make_model()
    before = weights_hash(loaded)
    other = copy.deepcopy(loaded)
    other.model.get_submodule("model.norm").weight.data[0] += 1
    assert weights_hash(other) != before == weights_hash(loaded)
    assert dataclasses.replace(loaded, source="elsewhere").hashes == {}
    assert loaded == dataclasses.replace(loaded)
    assert "hashes" not in repr(loaded)


def test_a_file_of_a_streamed_model_that_was_replaced_is_seen(model_dir: Path) -> None:
    loaded = unirank.load(model_dir, device="cpu", stream=True)
    before = weights_hash(loaded)
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0] += 1
    model.save_pretrained(model_dir.parent / "other")
    os.replace(model_dir.parent / "other" / "model.safetensors", model_dir / "model.safetensors")
    assert weights_hash(loaded) != before


def test_hashes_of_both_kinds_are_kept_apart(make_model, hashed: list[str]) -> None:
    loaded = make_model()
    tree, plain = weights_hash(loaded), weights_hash(loaded, like="abc")
    assert tree.startswith("tree:")
    assert not plain.startswith("tree:")
    assert (weights_hash(loaded), weights_hash(loaded, like=plain)) == (tree, plain)
    assert hashed == ["tree", "serial"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_store_has_the_new_kind(stream: bool, model_dir: Path, calibration, tmp_path: Path) -> None:
    loaded = unirank.load(model_dir, device="cpu", stream=stream)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    manifest = json.loads((store.path / MANIFEST).read_text())
    assert manifest["format"] == 5
    assert manifest["identity"]["model"]["weights_sha256"] == weights_hash(unirank.load(model_dir, device="cpu"))
    assert open_store(store.path).identity == store.identity


# -- a model that was compressed in place -----------------------------------------------------------------------------


@pytest.fixture(params=["truncate", "apply", "refine", "streamed"])
def consumed(
    request: pytest.FixtureRequest, model_dir: Path, calibration: unirank.Calibration, text_file: Path, tmp_path: Path
) -> tuple[LoadedModel, Path]:
    """A model after one of the functions that compress in place, and its store."""
    loaded = unirank.load(model_dir, device="cpu", stream=request.param == "streamed")
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    plan = unirank.plan(store, 0.3)
    if request.param == "refine":
        windows = unirank.make_workbench(loaded, store, text=str(text_file)).windows
        unirank.apply(loaded, store, plan, refine=unirank.Refine(), windows=windows)
    elif request.param == "truncate":
        unirank.truncate(loaded, store, plan)
    else:
        unirank.apply(loaded, store, plan)
    return loaded, store.path


def test_a_consumed_model_says_so_wherever_a_dense_one_is_asked_for(
    consumed: tuple[LoadedModel, Path], calibration: unirank.Calibration, text_file: Path, tmp_path: Path
) -> None:
    loaded, path = consumed
    store = open_store(path)
    plan = unirank.plan(store, 0.3)
    asked: list[Callable[[], object]] = [
        lambda: unirank.analyze(loaded, tmp_path / "again", calibration=calibration),
        lambda: unirank.analyze(loaded, path, calibration=calibration),
        lambda: unirank.truncate(loaded, store, plan),
        lambda: unirank.apply(loaded, store, plan),
        lambda: unirank.compress(loaded, 0.3, calibration=calibration),
        lambda: unirank.compress(loaded, 0.3, store=path),
        lambda: dry_run(loaded, tmp_path, calibration=calibration),
        lambda: check_model(loaded, store),
    ]
    if loaded.pages is None:  # else these are refused because they need the whole model
        windows = torch.zeros(2, 24, dtype=torch.int64)
        asked += [
            lambda: unirank.apply(loaded, store, plan, refine=unirank.Refine(), windows=windows),
            lambda: unirank.make_workbench(loaded, store, text=str(text_file)),
            lambda: unirank.diagnose(store, loaded, text=str(text_file)),
        ]
    before = sorted(tmp_path.iterdir())
    for ask in asked:
        with pytest.raises(unirank.InputError) as error:
            ask()
        assert str(error.value) == (
            f"The model {loaded.source} was compressed in place by an earlier apply, truncate or refine; load it "
            "again, or compress a copy with apply(..., copy=True)."
        )
    assert sorted(tmp_path.iterdir()) == before


def test_a_dense_model_is_dense(make_model) -> None:
    for name in ("llama", "gpt2", "opt"):
        make_model(name).require_dense()


def test_nothing_removed_consumes_nothing(make_model, calibration: unirank.Calibration, tmp_path: Path) -> None:
    loaded = make_model()
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    unirank.truncate(loaded, store, unirank.plan(store, 0.0))
    check_model(loaded, store)
