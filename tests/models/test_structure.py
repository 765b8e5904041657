"""What is no decoder of linear maps is refused for what it is, and what looks like it only is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

import unirank
from tests.support.tiny import COMMON, build
from unirank.models.structure import find_linears
from unirank.types import ListedSpec


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("conv", [nn.Conv1d(32, 32, 3, groups=32), nn.Conv2d(4, 4, 3), nn.ConvTranspose1d(8, 8, 2)])
def test_a_convolution_is_no_experts(conv: nn.Module) -> None:
    model = build("llama")
    before = find_linears(model)
    model.model.layers[1].self_attn.conv = conv
    assert find_linears(model) == before


@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 32, 1), (32, 1, 1), (1, 1, 4, 1)])
def test_a_vector_in_more_dimensions_is_no_experts(shape: tuple[int, ...]) -> None:
    model = build("llama")
    before = find_linears(model)
    model.model.layers[1].self_attn.mix = parameter(*shape)
    assert find_linears(model) == before


@pytest.mark.parametrize("shape", [(32, 4, 8), (64, 16)])
def test_weights_that_belong_to_no_linear_map_stay_whole(shape: tuple[int, ...]) -> None:
    """XLNet stacks its heads; Mamba has state-space parameters."""
    model = build("llama")
    before = find_linears(model)
    model.model.layers[1].self_attn.q = parameter(*shape)
    assert find_linears(model) == before


def test_layer_without_linears_is_refused() -> None:
    model = build("llama")
    model.model.layers[1] = nn.LayerNorm(32)
    with pytest.raises(unirank.InputError, match=r"^model\.layers\.1 holds no linear maps"):
        find_linears(model)


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (("attn", "mlp"), ["attention", "mlp"]),
        (("feed_forward", "self_attn"), ["mlp", "attention"]),
        (("one", "other"), ["attention", "mlp"]),
        (("mixer",), ["mixer"]),
        (("block",), ["block_"]),
        (("mamba*", "mlp"), ["mamba", "mlp"]),
        (("feed_forward", "mamba*"), ["mlp", "mamba"]),
        (("attn*", "mlp"), ["attention", "mlp"]),
        (("attention", "intermediate", "output"), ["attention", "intermediate", "output"]),
    ],
)
def test_names_of_sublayers(groups: tuple[str, ...], names: list[str]) -> None:
    """A star stands for a convolution beside the linear."""
    layer = nn.Module()
    for group in groups:
        child = nn.Module()
        child.linear = nn.Linear(8, 8)
        if group.endswith("*"):
            child.conv = nn.Conv1d(8, 8, 2)
        layer.add_module(group.rstrip("*"), child)
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    _, linears = find_linears(model)
    assert [spec.sublayer for spec in linears] == names


def test_linears_of_networks_in_a_list_are_targets_that_know_their_siblings() -> None:
    model = build("llama")
    model.model.layers[1].mlp.adapters = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
    _, linears = find_linears(model)
    listed = [spec for spec in linears if isinstance(spec, ListedSpec)]
    assert [spec.name for spec in listed] == [f"model.layers.1.mlp.adapters.{i}" for i in range(2)]
    assert {spec.siblings for spec in listed} == {"model.layers.1.mlp.adapters.*"}


class WithPart(LlamaConfig):
    """A configuration that has another one inside."""

    def __init__(self, part: PretrainedConfig | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.part = part


@pytest.mark.parametrize("nested", [False, True])
def test_experts_that_a_configuration_states_count_where_a_layer_holds_them(
    nested: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    stated = {"part": PretrainedConfig(moe_num_experts=4)} if nested else {"num_experts": 4}
    config = WithPart(**stated, **COMMON)
    model = LlamaForCausalLM(config)
    assert unirank.describe(model, tokenizer).layer_count == 3  # all layers are dense, as in Doge
    model.model.layers[1].mlp.w1 = parameter(4 * 48, 32)  # DBRX keeps its experts so
    message = r"^This mixture of experts is not supported: .*num_experts = 4, and mlp\.w1"
    with pytest.raises(unirank.InputError, match=message):
        unirank.describe(model, tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_dense_checkpoint_whose_configuration_states_experts_is_loaded(stream: bool, model_dir: Path) -> None:
    config = LlamaConfig.from_pretrained(model_dir)
    config.num_experts = 4
    config.save_pretrained(model_dir)
    assert unirank.load(model_dir, device="cpu", stream=stream).layer_count == 3


@pytest.mark.parametrize("whole", [False, True])
def test_layers_that_share_a_weight_are_refused(whole: bool) -> None:
    model = build("llama")
    layers = model.model.layers
    if whole:
        layers[2] = layers[0]
    else:
        layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(unirank.InputError, match=r"model\.layers\.0\..* and model\.layers\.2\..* are one weight"):
        find_linears(model)


def test_what_is_no_model_of_transformers_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(unirank.InputError, match=r"of transformers is needed, got Linear\.$"):
        unirank.describe(nn.Linear(2, 2), tokenizer)  # type: ignore[arg-type]


def test_model_that_reads_no_token_ids_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("llama")
    model.main_input_name = "input_values"
    with pytest.raises(unirank.InputError, match="LlamaForCausalLM reads input_values, not token ids"):
        unirank.describe(model, tokenizer)


@pytest.mark.parametrize("found", [None, nn.ModuleList(), nn.LayerNorm(4), NotImplementedError, AttributeError])
def test_model_without_a_matrix_of_embeddings_is_refused(found: Any, tokenizer, monkeypatch) -> None:
    def embeddings(_self: object) -> Any:
        if isinstance(found, type):
            raise found
        return found

    monkeypatch.setattr(LlamaForCausalLM, "get_input_embeddings", embeddings)
    with pytest.raises(unirank.InputError, match="LlamaForCausalLM has no matrix of token embeddings"):
        unirank.describe(build("llama"), tokenizer)


@pytest.mark.parametrize("error", [None, ValueError, RuntimeError])
def test_configuration_that_tells_of_no_single_decoder_is_refused(error: Any, tokenizer, monkeypatch) -> None:
    model = build("llama")

    def text(_self: object, **_: Any) -> Any:
        if error is not None:
            raise error("Multiple valid text configs.")
        return object()

    monkeypatch.setattr(LlamaConfig, "get_text_config", text)
    said = "states no hidden_size" if error is None else "does not tell of one decoder: Multiple valid text configs"
    with pytest.raises(unirank.InputError, match=f"The configuration of LlamaForCausalLM {said}"):
        unirank.describe(model, tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_model_that_transformers_cannot_build_is_refused(stream: bool, model_dir: Path, monkeypatch) -> None:
    def broken(_self: object, *_: Any, **__: Any) -> None:
        raise TypeError("no such size")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", broken)
    with pytest.raises(unirank.InputError, match=r"no such size\.$"):
        unirank.load(model_dir, device="cpu", stream=stream)
