"""Models larger than memory: layers read one at a time give the same bytes as a model loaded as a whole."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import unirank
from tests.support.architectures import ARCHITECTURES, NO_PLACE, build
from tests.support.stores import contents
from unirank.analysis.identity import weights_hash
from unirank.compression.densified import densify, save_dense
from unirank.disk import files
from unirank.models import shards
from unirank.types import LoadedModel

pytestmark = pytest.mark.slow


def in_memory(loaded: LoadedModel) -> list[str]:
    """Parameters of decoder layers that take memory."""
    layers = loaded.model.get_submodule(loaded.layers)
    return [name for name, parameter in layers.named_parameters() if not parameter.is_meta]


@pytest.fixture
def dense(tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    """`dense(name)`: a tiny checkpoint of several shards."""

    def make(name: str) -> Path:
        cls, changes, _ = ARCHITECTURES[name]
        model: Any = build(cls, changes)
        model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
        tokenizer.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return make


@pytest.mark.parametrize("scheme", ["whiten", "afm"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_store_checkpoint_and_densified_checkpoint_are_the_same(
    name: str,
    scheme: str,
    dense,
    tokenizer: PreTrainedTokenizerFast,
    calibration: unirank.Calibration,
    tmp_path: Path,
) -> None:
    source = dense(name)
    for kind in ("whole", "streamed"):
        loaded = unirank.load(source, device="cpu", stream=kind == "streamed")
        loaded = dataclasses.replace(loaded, tokenizer=tokenizer)  # Qwen2's class reads no words from a tiny one
        store = unirank.analyze(loaded, tmp_path / f"{kind}-store", scheme=scheme, calibration=calibration)
        plan = unirank.plan(store, 0.3)
        compressed = unirank.apply(loaded, store, plan)
        if kind == "streamed":
            assert all(name.endswith("bias") for name in in_memory(loaded))  # small, and only where they were added
        compressed.save(tmp_path / kind)
    assert contents(tmp_path / "streamed-store") == contents(tmp_path / "whole-store")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / kind)(ids).logits for kind in ("whole", "streamed")]
    assert torch.equal(*logits)
    if scheme == "afm" and name.startswith(NO_PLACE):
        return
    small = unirank.open_compressed(tmp_path / "streamed", device="cpu", stream=True)
    densify(small.model, pages=small.pages)
    save_dense(small, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, logits[0], rtol=1e-4, atol=1e-4)


def test_one_layer_at_a_time_is_in_memory(dense, calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analyze = importlib.import_module("unirank.analysis.fill_store")  # the package has a function of the name
    loaded = unirank.load(dense("llama, grouped queries"), device="cpu", stream=True)
    assert in_memory(loaded) == []
    seen = []
    calibrate = analyze.calibrate_layer

    def watched(loaded: LoadedModel, index: int, *arguments: Any, **options: Any) -> Any:
        seen.append({name.split(".")[0] for name in in_memory(loaded)})
        return calibrate(loaded, index, *arguments, **options)

    monkeypatch.setattr(analyze, "calibrate_layer", watched)
    unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    assert seen == [{"0"}, {"1"}, {"2"}]
    assert in_memory(loaded) == []


def test_gradients_and_their_schemes(dense, calibration, tmp_path: Path) -> None:
    source = dense("llama, grouped queries")
    for kind in ("whole", "streamed"):
        loaded = unirank.load(source, device="cpu", stream=kind == "streamed")
        unirank.analyze(loaded, tmp_path / kind, scheme="kfac", calibration=calibration)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


def test_the_hash_and_the_checks_are_those_of_the_whole_model(dense) -> None:
    source = dense("opt, biases and LayerNorm")
    streamed = unirank.load(source, device="cpu", stream=True)
    assert weights_hash(streamed) == weights_hash(unirank.load(source, device="cpu"))
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[3, 4] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(unirank.NonFiniteError, match=r"layers\.1\.fc1\.weight holds NaN"):
        unirank.load(source, device="cpu", stream=True)


def test_shards_and_their_index(dense, calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = unirank.load(dense("llama, grouped queries"), device="cpu", stream=True)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    compressed = unirank.apply(loaded, store, unirank.plan(store, 0.3))
    monkeypatch.setattr(shards.save_shards, "__kwdefaults__", {"shard_bytes": 16_000})
    out = compressed.save(tmp_path / "out")
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in compressed.model.state_dict().values()
    )
    assert unirank.open_compressed(out, device="cpu").report == compressed.report


def test_what_needs_the_whole_model_refuses(dense, calibration, text_file: Path, tmp_path: Path) -> None:
    loaded = unirank.load(dense("llama, grouped queries"), device="cpu", stream=True)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    plan = unirank.plan(store, 0.3)
    for run in (
        lambda: unirank.make_workbench(loaded, store, text=str(text_file)),
        lambda: unirank.diagnose(store, loaded),
        lambda: unirank.apply(
            loaded, store, plan, refine=unirank.Refine(), windows=torch.zeros(1, 4, dtype=torch.int64)
        ),
    ):
        with pytest.raises(unirank.InputError, match="needs the whole model in memory; load it without streaming"):
            run()


def test_hidden_states_in_mapped_files_change_no_byte(
    make_model, calibration: unirank.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    copy = files.mapped_copy

    def watched(folder: Path, tensor: torch.Tensor) -> torch.Tensor:
        made.append(copy(folder, tensor))
        assert not list(folder.glob(".hidden*"))  # nameless from the start
        return made[-1]

    monkeypatch.setattr(importlib.import_module("unirank.layerwise.recording"), "mapped_copy", watched)
    for limit, kind in ((2**40, "memory"), (0, "mapped")):
        unirank.analyze(make_model(), tmp_path / kind, calibration=calibration, hidden_limit=limit)
        assert len(made) == (0 if kind == "memory" else 3 * 4)  # three batches: the embeddings' and three layers'
    assert contents(tmp_path / "mapped") == contents(tmp_path / "memory")


def test_a_full_disk_is_found_before_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(unirank.WriteError, match="the disk is full"):
        files.mapped_copy(tmp_path, torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_mapped_files(make_model, calibration: unirank.Calibration, tmp_path: Path) -> None:
    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unirank.analyze(make_model(), tmp_path / "a", calibration=calibration, hidden_limit=0, progress=stop)
    unirank.analyze(make_model(), tmp_path / "a", calibration=calibration, hidden_limit=0)
    unirank.analyze(make_model(), tmp_path / "b", calibration=calibration)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
