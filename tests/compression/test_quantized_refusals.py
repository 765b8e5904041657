"""Quantised checkpoints: what makes no sense is refused, and what is damaged never loads."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import unirank
from tests.support.quantised import logits
from unirank import CompressedModel, InputError
from unirank.compression.checkpoint import read_record

REFUSED: dict[str, tuple[Callable[[Path, CompressedModel, Path], object], str]] = {
    "twice": (lambda path, model, work: unirank.quantize(path, 4), "is quantised and cannot be quantised again"),
    "other bits": (lambda path, model, work: unirank.quantize(path, 6), r"bits = 6 is not legal; legal values: 8, 4"),
    "other groups": (lambda path, model, work: unirank.quantize(path, group_size=48), "group_size = 48 is not legal"),
    "streamed": (
        lambda path, model, work: unirank.open_compressed(path, stream=True),
        "is quantised and is read as a whole; leave stream=True out",
    ),
    "fused": (lambda path, model, work: unirank.fuse(model.model), "is quantised and cannot be fused"),
    "tuned": (
        lambda path, model, work: unirank.finetune(path, "no text", work=work),
        "quantised and cannot be trained",
    ),
    "healed": (lambda path, model, work: unirank.heal(path, work=work), "quantised and cannot be trained"),
    "compressed": (lambda path, model, work: unirank.load(path), "is compressed already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str, quantised_checkpoints, tmp_path: Path) -> None:
    root, _ = quantised_checkpoints
    call, match = REFUSED[case]
    model = unirank.open_compressed(root / "llama-8", device="cpu")
    with pytest.raises(InputError, match=match):
        call(root / "llama-8", model, tmp_path / "work")
    assert not list(tmp_path.iterdir())


def test_a_dense_and_a_streamed_model_are_refused(quantised_checkpoints) -> None:
    root, _ = quantised_checkpoints
    dense = unirank.open_compressed(root / "llama", device="cpu")
    unirank.densify(dense.model)
    with pytest.raises(InputError, match="no low-rank layers; quantise a dense model with torchao itself"):
        unirank.quantize(dense)
    with pytest.raises(InputError, match="opened with stream=True cannot be quantised"):
        unirank.quantize(unirank.open_compressed(root / "llama", device="cpu", stream=True))


def test_without_torchao_the_extra_is_named(quantised_checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = quantised_checkpoints
    monkeypatch.delitem(sys.modules, "torchao.quantization")
    monkeypatch.setitem(sys.modules, "torchao", None)
    for call in (
        lambda: unirank.quantize(root / "llama"),
        lambda: unirank.open_compressed(root / "llama-8"),
        lambda: AutoModelForCausalLM.from_pretrained(root / "llama-8"),
    ):
        with pytest.raises(InputError, match=r"need torchao; install the extra: pip install 'unirank\[quantize\]'"):
            call()


def harmed(root: Path, name: str, place: Path, **config: Any) -> Path:
    """A copy of a checkpoint without the record of its checksums."""
    shutil.copytree(root / name, place)
    (place / "provenance.json").unlink()
    told = json.loads((place / "config.json").read_text())
    told["quantization_config"] |= config
    (place / "config.json").write_text(json.dumps(told))
    return place


def test_weights_that_are_missing_or_of_other_bits_never_load(quantised_checkpoints, tmp_path: Path) -> None:
    """Nor does a version of unirank read them that knows no bits: the same as a configuration that names none."""
    root, _ = quantised_checkpoints
    place = harmed(root, "llama-8", tmp_path / "old")
    told = json.loads((place / "config.json").read_text())
    for key in ("bits", "whole"):
        del told["quantization_config"][key]
    (place / "config.json").write_text(json.dumps(told))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(place)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(harmed(root, "llama-8", tmp_path / "four", bits=4))
    for config, match in (
        ({"bits": 5}, r"quantization_config\.bits = 5 is not legal"),
        ({"group_size": 48}, r"quantization_config\.group_size = 48 is not legal"),
        ({"whole": ["model.layers.0.self_attn.q_proj"]}, r"quantization_config\.whole must be a list"),
        ({"whole": ["model.layers.0.nothing"]}, r"no linear model\.layers\.0\.nothing"),
        ({"whole": ["model.norm"]}, r"not a linear, so it cannot be quantised"),
    ):
        place = harmed(root, "llama-8", tmp_path / "config", **config)
        with pytest.raises(InputError, match=match):
            AutoModelForCausalLM.from_pretrained(place)
        shutil.rmtree(place)
    place = harmed(root, "llama-8", tmp_path / "missing")
    tensors = load_file(place / "model.safetensors")
    gone = next(key.removesuffix(".quantized") for key in tensors if key.endswith(".left.quantized"))
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{gone}.")}
    save_file(kept, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"found no weights of 8 bits for {gone}"):
        AutoModelForCausalLM.from_pretrained(place)
    with pytest.raises(InputError, match=r"lacks the weights|found no weights"):
        unirank.open_compressed(place, device="cpu")


@pytest.mark.parametrize(
    "record",
    [{"bits": 5}, {"bits": 8, "group_size": 48}, {"matrices": -1}, {"bytes_after": "many"}, {"of_8_bits": None}, 3],
)
def test_a_record_that_is_damaged_is_said_to_be(record: Any, quantised_checkpoints, tmp_path: Path) -> None:
    root, _ = quantised_checkpoints
    shutil.copytree(root / "llama-8", tmp_path / "damaged")
    file = tmp_path / "damaged" / "provenance.json"
    known = json.loads(file.read_text())
    known["quantized"] = known["quantized"] | record if isinstance(record, dict) else record
    file.write_text(json.dumps(known))
    with pytest.raises(InputError, match=r"provenance\.json is missing or damaged"):
        read_record(tmp_path / "damaged")


def test_a_fused_model_is_quantised_and_forgets_that_it_was_fused(quantised_checkpoints) -> None:
    root, models = quantised_checkpoints
    opened = unirank.open_compressed(root / "llama", device="cpu")
    unirank.fuse(opened.model)
    opened = dataclasses.replace(opened, evaluations=({"report": {}},))
    quantised = unirank.quantize(opened)
    assert quantised.model is opened.model
    assert quantised.evaluations == ()
    assert torch.equal(logits(quantised.model), logits(models["llama-8"].model))
