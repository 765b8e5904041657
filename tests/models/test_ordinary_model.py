"""After loading, a compressed model is an ordinary one to transformers: what it forbids quantised models works."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import unirank
from tests.support.tiny import build
from unirank.models.low_rank import LowRankLinear

TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module", params=["factors", "pivoted"])
def out(request, tmp_path_factory: pytest.TempPathFactory, tokenizer, text_file: Path) -> Path:
    calibration = unirank.Calibration(text=str(text_file), windows=6, window=24)
    compressed = unirank.compress(
        build("llama"), 0.4, tokenizer=tokenizer, calibration=calibration, allocator="uniform", form=request.param
    )
    return compressed.save(tmp_path_factory.mktemp("ordinary") / "out")


def load(out: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(out, **options)


def low_rank(model: torch.nn.Module) -> int:
    return sum(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    ],
    ids=["half", "float", "double", "bfloat16", "to"],
)
def test_it_is_cast(out: Path, cast: Callable[[Any], Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(out)
    wanted = model(TOKENS).logits
    found = cast(model)(TOKENS).logits
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    model.save_pretrained(tmp_path / "cast")
    assert load(tmp_path / "cast", dtype="auto").dtype == dtype


def test_nothing_marks_it_but_its_config(out: Path) -> None:
    model = load(out)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        assert not getattr(model, name, None)
    assert model.config.quantization_config.quant_method == "unirank"
    assert low_rank(model) == len(model.config.quantization_config.ranks) > 5


def test_the_trainer_trains_all_its_weights(out: Path, tmp_path: Path) -> None:
    model = load(out)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    row = {"input_ids": TOKENS[0], "labels": TOKENS[0]}
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "learning_rate": 0.1}
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=1, **options)
    Trainer(model=model, args=arguments, train_dataset=[row, row]).train()  # pyright: ignore[reportArgumentType]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    again = load(tmp_path / "checkpoint-1")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_its_embeddings_are_resized(out: Path, tmp_path: Path) -> None:
    model = load(out)
    size = model.config.vocab_size + 8
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "resized")
    again = load(tmp_path / "resized")
    assert again(TOKENS).logits.shape[-1] == size
    assert low_rank(again) == low_rank(model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@torch.no_grad()
def test_its_inner_linears_are_quantised(out: Path) -> None:
    model = load(out).eval()
    wanted = model(TOKENS).logits
    smaller = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert type(smaller.get_submodule("model.layers.0.mlp.up_proj.right")) is not torch.nn.Linear
    assert (smaller(TOKENS).logits - wanted).abs().max() < 0.2 * wanted.abs().max()


def test_the_file_still_names_the_method_and_stops_a_loader_without_it(out: Path, tmp_path: Path) -> None:
    """By it a server finds our plugin; and without unirank nothing starts from random weights."""
    model = load(out)
    model.save_pretrained(tmp_path / "again")
    for place in (out, tmp_path / "again"):
        config = json.loads((place / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "unirank"
    config["quantization_config"]["quant_method"] = "unheard-of"
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"mismatch|ignore_mismatched_sizes"):
        load(tmp_path / "again")


def test_compressing_twice_says_which_model_to_take(out: Path, tokenizer, calibration) -> None:
    with pytest.raises(unirank.InputError, match=r"^The model .*is compressed already; compress the dense model"):
        unirank.compress(load(out), 0.4, tokenizer=tokenizer, calibration=calibration)


def test_a_densified_model_is_compressed_again(out: Path, tokenizer, calibration, tmp_path: Path) -> None:
    dense = unirank.densify(load(out))
    again = unirank.compress(dense, 0.6, tokenizer=tokenizer, calibration=calibration)
    assert low_rank(again.model) > 5
    reopened = unirank.open_compressed(again.save(tmp_path / "again"), device="cpu")
    assert torch.equal(reopened.model(TOKENS).logits, again.model(TOKENS).logits)


def test_adapters_go_to_left_and_right(out: Path, tmp_path: Path) -> None:
    """Those of the dense model's names are refused by peft, which says which module it cannot take."""
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"Target module LowRankLinear\("):
        peft.get_peft_model(load(out), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    config = peft.LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights=False)
    adapted = peft.get_peft_model(load(out), config)
    wanted = adapted(TOKENS).logits
    merged = adapted.merge_and_unload()
    assert (merged(TOKENS).logits - wanted).abs().max() < 1e-3 * wanted.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load(tmp_path / "merged")(TOKENS).logits, merged(TOKENS).logits)


class Quantised(torch.Tensor):
    """Stands for the tensors that torchao and others put in the place of weights."""


@pytest.mark.parametrize("what", ["saved", "fused", "densified", "trained"])
def test_a_model_whose_weights_are_another_library_s_is_refused(what: str, out: Path, tmp_path: Path) -> None:
    compressed = unirank.open_compressed(out, device="cpu")
    inner = compressed.model.get_submodule("model.layers.1.mlp.up_proj.right")
    assert isinstance(inner, torch.nn.Linear)
    inner._parameters["weight"] = inner.weight.detach().as_subclass(Quantised)  # pyright: ignore[reportArgumentType]
    calls: dict[str, Callable[[], object]] = {
        "saved": lambda: compressed.save(tmp_path / "again"),
        "fused": lambda: unirank.fuse(compressed.model),
        "densified": lambda: unirank.densify(compressed.model),
        "trained": lambda: unirank.heal(compressed, work=tmp_path / "work"),
    }
    with pytest.raises(
        unirank.InputError, match=rf"up_proj\.right\.weight is a Quantised of tests, .* be {what} before"
    ):
        calls[what]()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", [unirank.fuse, unirank.densify])
def test_a_compressed_model_is_asked_for_its_model(function: Callable[[Any], object], out: Path) -> None:
    with pytest.raises(unirank.InputError, match="got CompressedModel; its part model is one: give that"):
        function(unirank.open_compressed(out, device="cpu"))
