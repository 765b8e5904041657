"""A directory that holds something else than a model is refused for what it holds, with what to do next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config, ViTConfig

import unirank
from tests.support.command_line import Run
from unirank.models import sources
from unirank.models.loading import load_pretrained

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 538090408\n"


def removed(pattern: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for file in folder.glob(pattern):
            file.unlink()
        return folder

    return make


def with_file(name: str, text: str = "{}", but: str = "") -> Callable[[Path], Path]:
    """The file `name` added, and what matches `but` taken away."""

    def make(folder: Path) -> Path:
        if but:
            removed(but)(folder)
        (folder / name).write_text(text)
        return folder

    return make


def with_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return folder

    return make


def with_config(**changes: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def of_type(config: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        config.save_pretrained(folder)
        return folder

    return make


def inside(name: str) -> Callable[[Path], Path]:
    """The directory that holds the model's directory."""

    def make(folder: Path) -> Path:
        outer = folder.parent / "outer"
        shutil.copytree(folder, outer / name)
        return outer

    return make


def a_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text("GGUF")
        return folder / name

    return make


Q = "model.layers.0.self_attn.q_proj"
ALONE = "adapter_config.json"
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}})
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "adapter": (with_file(ALONE, but="*"), r"is an adapter \(adapter_config\.json\), not a model; merge it .*NEW\)\.$"),
    "model and adapter": (with_file(ALONE), r"holds a model and an adapter .* not merged into it; merge it first: "),
    "training run": (inside("checkpoint-9"), r"no config\.json.*give one of the directories .*outer/checkpoint-9\.$"),
    "hub's cache": (inside("snapshots/abc"), r"no config\.json.*such as \S*outer/snapshots/abc\.$"),
    "GGUF beside nothing": (with_file("m.gguf", but="*"), r"no config\.json.*it holds GGUF; .*gguf_file=NAME"),
    "GGUF": (with_file("m.gguf", but="*.safetensors"), r"m\.gguf is GGUF, which unirank does not.*gguf_file=NAME"),
    "a GGUF file": (a_file("m.gguf"), r"m\.gguf is a file, and a model is a directory .*gguf_file=NAME"),
    "a file": (lambda folder: folder / "model.safetensors", r"safetensors is a file, and a model is a directory"),
    "pickle": (with_file("pytorch_model.bin", but="*.safetensors"), r"pytorch_model\.bin is a pickle.*save_pretrained"),
    "TensorFlow": (with_file("tf_model.h5", but="*.safetensors"), r"tf_model\.h5 is TensorFlow's, which unirank"),
    "no weights": (removed("*.safetensors"), r"holds no weights in safetensors; download them too"),
    "only arguments": (with_file("training_args.bin", but="*.safetensors"), r"safetensors; download them too"),
    "a shard is missing": (
        with_file("model.safetensors.index.json", INDEX, but="*.safetensors"),
        r"index\.json names model-00001-of-00002\.safetensors, which is not there; download",
    ),
    "LFS weights": (with_file("model.safetensors", POINTER), r"model\.safetensors is a Git LFS pointer.* git lfs pull"),
    "LFS tokenizer": (with_file("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "LFS config": (with_file("config.json", POINTER), r"config\.json is a Git LFS pointer"),
    "no tokenizer": (removed("tokenizer*"), r"has no tokenizer that can be read \(.*\S\); put the tokenizer's files"),
    "damaged tokenizer": (with_file("tokenizer.json", "{"), "has no tokenizer that can be read"),
    "damaged config": (with_file("config.json", "{"), r"The config\.json of .* cannot be read"),
    "names of a wrapper": (
        with_tensors(lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}),
        r"lacks the weights (\S+ ){3}and \d+ more; it holds others, such as _orig_mod\.model",
    ),
    "adapter in the file": (
        with_tensors(lambda tensors: tensors | {f"{Q}.lora_A.default.weight": torch.zeros(2, 32)}),
        rf"holds {Q}\.lora_A\.default\.weight, which {Q} has no place for: an adapter that is not merged",
    ),
    "scale in the file": (
        with_tensors(lambda tensors: tensors | {f"{Q}.weight_scale_inv": torch.ones(1)}),
        rf"{Q}\.weight_scale_inv, which {Q} has no place for: .* or a quantized weight's",
    ),
    "another model's config": (with_config(intermediate_size=40), r"they have other shapes than its config\.json says"),
    "vision": (of_type(ViTConfig()), r"is of type vit, of which transformers has no causal language model"),
    "encoder and decoder": (of_type(T5Config()), r"is of type t5, of which transformers has no causal language model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("read", [unirank.load, load_pretrained])
def test_the_refusal_names_the_cause_and_what_is_next(name: str, read: Any, model_dir: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(unirank.InputError, match=message) as caught:
        read(make(model_dir), device="cpu")
    assert "hub (" not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["gptq", "bitsandbytes"])
def test_a_quantized_checkpoint_is_refused_before_its_libraries_are_asked_for(
    name: str, stream: bool, model_dir: Path
) -> None:
    with_config(quantization_config={"quant_method": name, "bits": 4, "load_in_4bit": True})(model_dir)
    with pytest.raises(unirank.InputError, match=rf"is quantized \({name}\); compress the unquantized one"):
        unirank.load(model_dir, device="cpu", stream=stream)


def test_a_compressed_checkpoint_is_refused_before_its_weights_are_read(
    make_model, calibration: unirank.Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unirank.compress(make_model(), 0.3, calibration=calibration).save(tmp_path / "out")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(unirank.InputError, match="is compressed already; compress the dense model"):
        unirank.load(out, device="cpu")


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_of_the_hub_is_refused(alone: bool, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    """transformers would add it to the model without a word."""
    real = sources.AutoConfig.from_pretrained

    def config(path: str, **options: Any) -> Any:
        if alone:
            raise OSError(f"{path} does not appear to have a file named config.json")
        return real(model_dir, **options)

    monkeypatch.setattr(sources.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr(sources, "find_adapter_config_file", lambda path, **_: "adapter_config.json")
    with pytest.raises(unirank.InputError, match="is an adapter" if alone else "holds a model and an adapter"):
        unirank.load("somebody/adapter", device="cpu")


@pytest.mark.parametrize("stream", [False, True])
def test_a_cast_that_overflows_is_not_called_damage(stream: bool, model_dir: Path) -> None:
    file, name = model_dir / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    said = rf"{name} does not fit into float16, which ends at 65504; .*another dtype=, such as auto or bfloat16"
    with pytest.raises(unirank.NonFiniteError, match=said):
        unirank.load(model_dir, device="cpu", dtype="float16", stream=stream)
    assert unirank.load(model_dir, device="cpu", dtype="bfloat16", stream=stream).layer_count == 3
    tensors[name][0, 0] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(unirank.NonFiniteError, match="the checkpoint is damaged"):
        unirank.load(model_dir, device="cpu", stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_tensors_that_no_linear_is_meant_by_are_passed_over(stream: bool, model_dir: Path) -> None:
    """As transformers does: buffers that older releases saved, heads of other tasks."""
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "score.weight": torch.zeros(2, 32)}
    with_tensors(lambda tensors: tensors | more | {f"{Q}.bias": torch.zeros(32)})(model_dir)
    assert unirank.load(model_dir, device="cpu", stream=stream).layer_count == 3
    with_tensors(lambda tensors: tensors | {f"{Q}.lora_B.default.weight": torch.zeros(32, 2)})(model_dir)
    with pytest.raises(unirank.InputError, match="an adapter that is not merged"):
        unirank.load(model_dir, device="cpu", stream=stream)


def test_the_command_says_it_in_its_own_words(run_unirank: Run, model_dir: Path, tmp_path: Path) -> None:
    with_file("pytorch_model.bin", but="*.safetensors")(model_dir)
    code, _, err = run_unirank("compress", model_dir, "-r", "0.3", "-o", tmp_path / "out", "--device", "cpu")
    assert code == 2
    assert "pytorch_model.bin is a pickle, which unirank does not read; " in err
    assert not (tmp_path / "out-analysis").exists()
