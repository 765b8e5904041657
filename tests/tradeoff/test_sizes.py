"""Bytes, parameters and operations from ranks alone, against modules and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from unirank.models.low_rank import LowRankLinear, count_parameters
from unirank.models.quantizing import stored_bytes
from unirank.tradeoff.sizes import Sizes
from unirank.types import DENSE, Rank


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in the files, by their headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        total += sum(
            one["data_offsets"][1] - one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"
        )
    return total


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gpt2", "gpt-neox", "opt"])
@pytest.mark.parametrize(("scheme", "form"), [("whiten", "factors"), ("afm", "pivoted")])
def test_sizes_from_ranks_are_those_of_modules_and_files(
    name: str, scheme: str, form, make_model, calibration, tmp_path: Path
) -> None:
    loaded = make_model(name, **({"hidden_size": 64, "intermediate_size": 96} if name == "llama" else {}))
    sizes = Sizes.of(loaded)
    whole: dict[str, Rank] = {spec.name: DENSE for spec in loaded.linears}
    assert sizes.weight_bytes(whole, form, "float32") == stored_bytes(loaded.model)
    store = unirank.analyze(loaded, tmp_path / "store", scheme=scheme, calibration=calibration)
    plan = unirank.plan(store, 0.3, form=form)
    compressed = unirank.apply(loaded, store, plan, copy=True)
    adds = scheme == "afm"
    assert sizes.parameters_at(plan.ranks, form, adds_bias=adds) == count_parameters(compressed.model)
    sizes_of = sizes.table(plan.ranks, form, adds_bias=adds)
    assert sizes_of["float32"] == stored_bytes(compressed.model)
    assert sizes_of["float32"] == tensor_bytes(compressed.save(tmp_path / "floats"))
    for bits in (8, 4):
        small = unirank.quantize(copy.deepcopy(compressed), bits)
        assert sizes_of[f"int{bits}"] == stored_bytes(small.model) == tensor_bytes(small.save(tmp_path / f"{bits}"))
    half: Any = compressed.model
    assert sizes_of["bfloat16"] == stored_bytes(half.to(torch.bfloat16))


def test_whole_numbers_have_the_scales_of_the_models_dtype(make_model, calibration, tmp_path: Path) -> None:
    loaded = make_model("llama", hidden_size=64, intermediate_size=96)
    model: Any = loaded.model
    model.to(torch.bfloat16)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    plan = unirank.plan(store, 0.4, form="pivoted", multiple_of=16)
    table = Sizes.of(loaded).table(plan.ranks, plan.form)
    compressed = unirank.apply(loaded, store, plan)
    assert table["bfloat16"] == stored_bytes(compressed.model)
    small = unirank.quantize(compressed, 8)
    assert table["int8"] == stored_bytes(small.model)
    assert small.quantized is not None
    assert small.quantized.group_size == 32


def test_operations_are_two_a_weight_that_is_multiplied(make_model, calibration, tmp_path: Path) -> None:
    """Counted where they happen: at every matrix product of one token."""
    loaded = make_model("llama")
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    plan = unirank.plan(store, 0.3, form="pivoted")
    sizes = Sizes.of(loaded)
    counted = 0

    def count(module, args, _output) -> None:
        nonlocal counted
        counted += 2 * module.weight.numel() * args[0].shape[-2]

    model = unirank.apply(loaded, store, plan).model
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    model(input_ids=torch.tensor([[5]]), use_cache=False)
    assert counted == sizes.flops(plan.used)
