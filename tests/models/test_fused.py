"""Down-projections that share an input, multiplied at once: the same logits, the same checkpoint, no byte more."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig

import unirank
from tests.support.tiny import COMMON
from unirank.models.low_rank import LowRankLinear

IDS = torch.arange(2, 30)[None]


@pytest.fixture
def compressed(make_model, calibration: unirank.Calibration):
    def make(name: str = "llama") -> unirank.CompressedModel:
        return unirank.compress(make_model(name), 0.6, allocator="uniform", calibration=calibration)

    return make


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_groups_are_what_reads_the_same_tensor(compressed) -> None:
    model = compressed().model
    before = logits(model)
    groups = unirank.fuse(model)
    layer = "model.layers.0"
    assert groups[:2] == [
        tuple(f"{layer}.self_attn.{kind}_proj" for kind in "qkv"),
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
    ]
    assert len(groups) == 2 * model.config.num_hidden_layers
    close(logits(model), before)


def test_parallel_sublayers_read_one_tensor(tokenizer, calibration: unirank.Calibration) -> None:
    torch.manual_seed(0)
    loaded = unirank.describe(AutoModelForCausalLM.from_config(CohereConfig(**COMMON)).eval(), tokenizer, source="c")
    model = unirank.compress(loaded, 0.6, allocator="uniform", calibration=calibration).model
    before = logits(model)
    assert [len(group) for group in unirank.fuse(model)] == [5] * 3  # q, k, v, gate and up
    close(logits(model), before)


def test_the_product_is_computed_once(compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed().model
    unirank.fuse(model)
    calls: list[int] = []
    plain = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: calls.append(len(w)) or plain(x, w, b))
    logits(model)
    low = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    stacked = [calls.count(sum(layer.rank for layer in low[:3])), calls.count(low[4].rank + low[5].rank)]
    assert min(stacked) >= model.config.num_hidden_layers
    assert len(low) == 7 * model.config.num_hidden_layers
    # 7 up-projections and 4 down-projections a layer (qkv, o, gate and up, down), and the head
    assert len(calls) == 11 * model.config.num_hidden_layers + 1


def test_decoding_with_the_cache(compressed) -> None:
    model = compressed().model
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
    unirank.fuse(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)
    with torch.inference_mode():
        close(model(IDS).logits, logits(model))


def test_gradients_take_the_plain_path(compressed) -> None:
    model = compressed().model
    expected = torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters()))
    unirank.fuse(model)
    for a, b in zip(torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters())), expected, strict=True):
        assert torch.equal(a, b)


def test_what_is_written_to_a_weight_shows(compressed) -> None:
    model = compressed().model
    unirank.fuse(model)
    plain = copy.deepcopy(model)
    for one in (model, plain):
        with torch.no_grad():
            one.model.layers[0].self_attn.k_proj.right.weight.mul_(3)
    for module in plain.modules():
        if isinstance(module, LowRankLinear):
            module.shared = None
    close(logits(model), logits(plain))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("change", ["cast", "replaced", "adapted"])
def test_what_no_longer_fits_falls_back(compressed, change: str) -> None:
    model: Any = compressed().model
    expected: Any = copy.deepcopy(model)
    unirank.fuse(model)
    outputs = []
    for one in (model, expected):
        torch.manual_seed(0)
        if change == "cast":
            one = one.double()
        elif change == "replaced":
            weight = one.model.layers[0].mlp.up_proj.right.weight
            weight.data = weight.data * 2
        else:
            one = get_peft_model(one, LoraConfig(target_modules=["right"], init_lora_weights=False))
        outputs.append(logits(one))
    close(*outputs)


def test_checkpoints_and_memory_are_the_same(compressed, tmp_path: Path) -> None:
    one, other = compressed(), compressed()
    before = sum(parameter.numel() for parameter in one.model.parameters())
    unirank.fuse(one.model)
    assert sum(parameter.numel() for parameter in one.model.parameters()) == before
    file = "model.safetensors"
    saved = load_file(one.save(tmp_path / "fused") / file)
    expected = load_file(other.save(tmp_path / "plain") / file)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fused")), logits(one.model))


def test_fusing_twice_is_fusing_once(compressed) -> None:
    model = compressed().model
    assert unirank.fuse(model) == unirank.fuse(model)
    close(logits(model), logits(compressed().model))


def test_compiled_models_take_the_plain_path(compressed) -> None:
    model = compressed().model
    before = logits(model)
    unirank.fuse(model)
    assert torch.equal(logits(torch.compile(model, backend="eager", fullgraph=True)), before)


def test_refusals(make_model, compressed) -> None:
    with pytest.raises(unirank.InputError, match="no low-rank layers, so there is nothing to fuse"):
        unirank.fuse(make_model().model)
    model = compressed().model.to("meta")
    with pytest.raises(unirank.InputError, match="are not in memory"):
        unirank.fuse(model)
