"""Files hold the names and shapes that `save_pretrained` gives, also where tensors are read and written one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, revert_weight_conversion

import unirank
from tests.support.every_decoder import build
from tests.support.stores import contents
from tests.support.tiny import COMMON
from unirank.compression.densified import densify, save_dense
from unirank.models.file_names import FileTensors, join_again, keep_apart
from unirank.models.low_rank import make_low_rank
from unirank.models.shards import save_shards
from unirank.models.streamed import Pages

# Renamed on loading: every name, one name, and a multimodal model's by where they stand.
RENAMED = ("exaone", "gpt_neox", "gemma3")
IDS = torch.arange(2, 42)[None]


class JoinedConfig(T.LlamaConfig):
    model_type = "joined_llama"


class JoinedForCausalLM(T.LlamaForCausalLM):
    config_class = JoinedConfig


@pytest.fixture(scope="module")
def joined() -> type[PreTrainedModel]:
    """A class whose files hold q, k and v as one matrix, as gate and up, and call attention otherwise."""
    if JoinedConfig.model_type not in T.CONFIG_MAPPING:
        T.AutoConfig.register(JoinedConfig.model_type, JoinedConfig)
        AutoModelForCausalLM.register(JoinedConfig, JoinedForCausalLM)
        parts = [f"self_attn.{name}_proj.weight" for name in "qkv"]
        both = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        register_checkpoint_conversion_mapping(
            JoinedConfig.model_type,
            [
                WeightConverter("attn.qkv.weight", parts, operations=[Chunk(dim=0)]),
                WeightConverter("mlp.gate_up.weight", both, operations=[Chunk(dim=0)]),
                WeightRenaming(r"\.attn\.out\.", ".self_attn.o_proj."),
            ],
        )
    return JoinedForCausalLM


@pytest.fixture
def made(joined: type[PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = joined(JoinedConfig(**COMMON | {"num_key_value_heads": 4, "tie_word_embeddings": True}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def in_files(folder: Path) -> dict[str, list[int]]:
    """Shapes of the tensors by their names in the files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    return found


def compressed_both_ways(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    calibration: unirank.Calibration,
    folder: Path,
    *,
    ranks: dict[str, Any] | None = None,
    streams: bool = True,
) -> None:
    """Writes "base", and "whole" and "streamed" from it, and "dense" and "dense-streamed" from that."""
    remove = 0.3 if ranks is None else None
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for kind, stream in (("whole", False), *([("streamed", True)] if streams else [])):
        made = unirank.compress(
            folder / "base", remove, ranks=ranks, calibration=calibration, device="cpu", stream=stream
        )
        made.save(folder / kind)
    for kind, stream in (("dense", False), ("dense-streamed", True)):
        opened = unirank.open_compressed(folder / "whole", device="cpu", stream=stream)
        densify(opened.model, pages=opened.pages)
        save_dense(opened, folder / kind)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits


@pytest.mark.parametrize("kind", RENAMED)
def test_streamed_and_whole_are_the_same_bytes_and_densified_names_are_the_originals(
    kind: str, tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    model = build(kind)
    compressed_both_ways(model, tokenizer, calibration, tmp_path)
    base = in_files(tmp_path / "base")
    assert base.keys() != model.state_dict().keys()  # or the rest would say nothing
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")
    assert in_files(tmp_path / "dense") == in_files(tmp_path / "dense-streamed") == base
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(tmp_path / "whole"), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(tmp_path / "dense"), logits(tmp_path / "dense-streamed"))


def test_where_files_join_matrices_a_compressed_model_keeps_them_apart_and_a_densified_one_joins_them(
    made: PreTrainedModel, tokenizer, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    """Also where only one of the matrices is low-rank, so that the others cannot be joined with it."""
    linears = unirank.describe(made, tokenizer).linears
    ranks = {spec.name: "dense" if spec.kind in ("mlp.gate_proj", "self_attn.k_proj") else 6 for spec in linears}
    # The dense model cannot be streamed: transformers would have to take its matrices apart first.
    compressed_both_ways(made, tokenizer, calibration, tmp_path, ranks=ranks, streams=False)
    with pytest.raises(unirank.InputError, match="cannot be read layer by layer; load it as a whole, without stream"):
        unirank.load(tmp_path / "base", device="cpu", stream=True)
    made.save_pretrained(tmp_path / "apart", save_original_format=False)  # what the troubleshooting page advises
    tokenizer.save_pretrained(tmp_path / "apart")
    assert unirank.load(tmp_path / "apart", device="cpu", stream=True).pages is not None
    base, compressed = in_files(tmp_path / "base"), in_files(tmp_path / "whole")
    assert base["model.layers.0.attn.qkv.weight"] == [96, 32]
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= compressed.keys()
    assert in_files(tmp_path / "dense") == in_files(tmp_path / "dense-streamed") == base
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(tmp_path / "whole"), rtol=1e-4, atol=1e-4)
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    assert in_files(tmp_path / "again") == compressed
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "whole"))


def test_quantised_matrices_stay_apart_where_files_join_the_floats(
    made: PreTrainedModel, tokenizer, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    """Also in a layer in which all matrices that are joined stayed dense."""
    linears = unirank.describe(made, tokenizer).linears
    ranks: dict[str, Any] = {spec.name: 6 if spec.layer == 1 else "dense" for spec in linears}
    compressed = unirank.compress(made, ranks=ranks, tokenizer=tokenizer, calibration=calibration)
    quantised = unirank.quantize(compressed, 8)
    quantised.save(tmp_path / "8")
    assert "model.layers.0.self_attn.q_proj.quantized" in in_files(tmp_path / "8")
    opened = unirank.open_compressed(tmp_path / "8", device="cpu")
    assert torch.equal(logits(tmp_path / "8"), opened.model(IDS).logits)
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "8"), quantised.model(IDS).logits)
    unirank.densify(opened.model).save_pretrained(tmp_path / "dense")
    assert in_files(tmp_path / "dense")["model.layers.0.attn.qkv.weight"] == [96, 32]
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(tmp_path / "8"), rtol=1e-4, atol=1e-4)


def test_tensors_that_are_joined_are_read_once_and_equal_transformers(made: PreTrainedModel) -> None:
    state = {name: tensor for name, tensor in made.state_dict().items() if name != "lm_head.weight"}
    expected = revert_weight_conversion(made, dict(state))
    read = []

    def reading(name: str) -> torch.Tensor:
        read.append(name)
        return state[name]

    written = FileTensors(made, {name: tensor.to("meta") for name, tensor in state.items()}, reading)
    assert list(written.empty) == list(expected)
    assert not read
    for name, tensor in expected.items():
        assert torch.equal(written.take(name), tensor)
    assert sorted(read) == sorted(state)


def test_names_that_depend_on_other_tensors_are_converted_all_at_once(made: PreTrainedModel, monkeypatch) -> None:
    """As transformers' `GroupWeightRename` does; here a joined matrix has another name where it is not alone."""

    def revert(_model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "all" if len(tensors) == 3 else "some"
        return {name: torch.cat([tensor for _, tensor in sorted(tensors.items())])} if tensors else {}

    monkeypatch.setattr("unirank.models.file_names.revert_weight_conversion", revert)
    state = {name: torch.full((2,), float(index)) for index, name in enumerate("abc")}
    written = FileTensors(made, state, state.__getitem__)
    assert list(written.empty) == ["all"]
    assert written.take("all").tolist() == [0, 0, 1, 1, 2, 2]


def test_a_model_is_kept_apart_only_where_a_joined_matrix_is_low_rank(made: PreTrainedModel) -> None:
    before = revert_weight_conversion(made, made.state_dict()).keys()
    make_low_rank(made, "model.layers.0.self_attn.o_proj", 4)
    keep_apart(made)
    assert "model.layers.1.attn.qkv.weight" in revert_weight_conversion(made, made.state_dict())
    make_low_rank(made, "model.layers.1.mlp.up_proj", 4)
    keep_apart(made)
    names = revert_weight_conversion(made, made.state_dict()).keys()
    assert {"model.layers.1.attn.qkv.weight", "model.layers.1.mlp.up_proj.left.weight"} <= names
    assert "model.layers.0.attn.out.left.weight" in names
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"):
        made.set_submodule(name, torch.nn.Linear(1, 1, bias=False))
    join_again(made)
    assert revert_weight_conversion(made, dict.fromkeys(made.state_dict(), torch.zeros(8, 8))).keys() == before


@pytest.fixture
def on_the_disk(tmp_path: Path) -> tuple[PreTrainedModel, Pages, PreTrainedModel]:
    """The same model, streamed and whole."""
    model = build("exaone")
    model.save_pretrained(tmp_path / "base")
    skeleton = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    layers: Any = skeleton.model.layers
    weights = {f"model.layers.{name}": tensor.detach().clone() for name, tensor in layers.state_dict().items()}
    layers.to("meta")
    return skeleton, Pages("model.layers", weights, torch.device("cpu")), model


@pytest.mark.parametrize("limit", [1, 9_000, 20_000, 2**30])
def test_shards_and_index_are_those_of_transformers(limit: int, on_the_disk, tmp_path: Path) -> None:
    """Also with tensors larger than a shard may be."""
    skeleton, pages, model = on_the_disk
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    (tmp_path / "ours").mkdir()
    save_shards(skeleton, pages, tmp_path / "ours", shard_bytes=limit)
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file() == (limit < 2**30)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [type(model).__name__]
