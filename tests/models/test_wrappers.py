"""What is put around a model or into it is taken off where that loses nothing, and refused before any work else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from torch import distributed, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import unirank
from tests.support.tiny import build

IDS = torch.arange(2, 30)[None]


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_accelerator() -> Iterator[None]:
    """accelerate keeps its first settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    with torch.no_grad():
        model(IDS)
    return model


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "compile": compiled,
    "compile in place": in_place,
    "DataParallel": DataParallel,
    "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_only_wraps_is_taken_off(
    name: str, tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    model = build("llama")
    wrapped = WRAPPED[name](model)
    done = unirank.compress(wrapped, 0.3, tokenizer=tokenizer, calibration=calibration)
    assert done.model is model
    saved = AutoModelForCausalLM.from_pretrained(done.save(tmp_path / "out"))
    plain = unirank.compress(build("llama"), 0.3, tokenizer=tokenizer, calibration=calibration).model
    with torch.no_grad():
        assert torch.equal(saved(IDS).logits, plain(IDS).logits)
        assert torch.equal(wrapped(IDS).logits, plain(IDS).logits)  # and what wraps it shows what was done


def test_wrappers_of_wrappers_are_taken_off(group: None, tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = build("llama")
    wraps: list[Any] = [compiled(DataParallel(model)), DistributedDataParallel(compiled(model))]
    for wrapped in wraps:
        assert unirank.describe(wrapped, tokenizer).model is model


def lora(**more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)


class Holder(nn.Module):
    """Such as trl's model with a value head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.pretrained_model = model


class Packed(torch.Tensor):
    """A tensor of another library, which has no values of its own."""

    @staticmethod
    def __new__(cls, of: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented if func is not torch.ops.aten.detach.default else args[0]


class LoraLinear(nn.Linear):
    """An adapter as loralib has it: parameters beside the weight."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, bias=False)
        self.lora_a, self.lora_b = nn.Parameter(torch.zeros(2, n)), nn.Parameter(torch.zeros(m, 2))


class HousedLora(nn.Linear):
    """An adapter as the library `adapters` has it: modules inside the linear."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__(n, m, bias=False)
        self.loras = nn.ModuleDict({"a": nn.Linear(n, m, bias=False)})


def injected(model: PreTrainedModel) -> PreTrainedModel:
    """As `model.add_adapter` leaves it."""
    peft.inject_adapter_in_model(lora(), model)
    return model


def with_part(path: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def make(model: PreTrainedModel) -> PreTrainedModel:
        model.set_submodule(path, change(model.get_submodule(path)))
        return model

    return make


def with_weight(change: Callable[[torch.Tensor], nn.Parameter]) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        linear = model.model.layers[1].mlp.up_proj
        linear.weight = change(linear.weight.data)
        return model

    return make


def marked(weight: torch.Tensor) -> nn.Parameter:
    """As DeepSpeed's ZeRO-3 leaves it."""
    parameter = nn.Parameter(weight.new_empty(0))
    parameter.ds_id = 3  # type: ignore[attr-defined]
    return parameter


def prepared(model: Any) -> Any:
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def weight_normed(linear: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(linear)


def compiled_in_place(layer: nn.Module) -> nn.Module:
    layer.compile(backend="eager")
    return layer


LAYER, UP = "model.layers.1", "model.layers.1.mlp.up_proj"
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "PeftModel": (lambda model: peft.get_peft_model(model, lora()), r"PeftModelForCausalLM.*merge_and_unload\(\)"),
    "its inside": (
        lambda model: peft.get_peft_model(model, lora()).base_model.model,
        r"adapters that are not merged, such as at model\.layers\.0\.self_attn\.q_proj.*merge_and_unload\(\)",
    ),
    "injected": (injected, r"not merged, such as at model\.layers\.0\.self_attn\.q_proj"),
    "trained copies": (
        lambda model: (
            peft.get_peft_model(
                model, peft.LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["norm"])
            ).base_model.model
        ),
        r"not merged, such as at model\.\S*norm",
    ),
    "compiled PeftModel": (lambda model: compiled(peft.get_peft_model(model, lora())), "not merged"),
    "holder": (Holder, r"got Holder; its part pretrained_model is one: give that"),
    "record": (lambda model: SimpleNamespace(model=model), r"got SimpleNamespace; its part model is one: give that"),
    "compiled part": (with_part(LAYER, compiled), rf"part {LAYER} is wrapped by torch\.compile"),
    "part compiled in place": (with_part(LAYER, compiled_in_place), rf"part {LAYER} is compiled"),
    "checkpointed part": (with_part(LAYER, checkpoint_wrapper), rf"part {LAYER} is wrapped by torch's checkpoint"),
    "mixed precision": (prepared, r"accelerator\.unwrap_model\(model, keep_fp32_wrapper=False\)"),
    "loralib": (with_part(UP, lambda _: LoraLinear(32, 48)), rf"{UP} is a LoraLinear .* lora_a, lora_b; .*merge"),
    "adapters": (with_part(UP, lambda _: HousedLora(32, 48)), rf"{UP} is a HousedLora that also holds loras"),
    "parametrized": (with_part(UP, weight_normed), rf"{UP} is a Parametrized\w* that also holds parametrizations"),
    "pruned": (with_part(UP, lambda u: prune.random_unstructured(u, "weight", 0.5)), "also holds weight_orig"),
    "zero 3": (with_weight(marked), rf"{UP}\.weight is sharded: .*Save the whole model"),
    "packed": (
        with_weight(lambda w: nn.Parameter(Packed(w))),
        rf"{UP}\.weight is a Packed of tests, .* must be compressed before",
    ),
    "float8": (with_weight(lambda w: nn.Parameter(w.to(torch.float8_e4m3fn))), rf"{UP} is float8_e4m3fn, and bfloat16"),
    "int8": (with_weight(lambda w: nn.Parameter(w.to(torch.int8), False)), rf"{UP} is int8, and bfloat16"),
    "on meta": (lambda model: model.to("meta"), r"embed_tokens\.weight is not in memory.*with stream=True"),
    "offloaded": (lambda model: cpu_offload(model), r"is not in memory: it was offloaded"),
    "a part on meta": (with_part(UP, lambda u: u.to("meta")), rf"{UP}\.weight is not in memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_with_the_way_out(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    make, message = REFUSED[name]
    with pytest.raises(unirank.InputError, match=message):
        unirank.describe(make(build("llama")), tokenizer)


def test_a_wrapped_model_is_evaluated_and_densified(
    make_model, calibration: unirank.Calibration, text_file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Compiled, parallel or with adapters; and what is none is told so."""
    done = unirank.compress(make_model(), 0.3, calibration=calibration)
    asked: dict[str, Any] = {"text": str(text_file), "window": 24, "limit": 2}
    plain = unirank.evaluate(done.model, tokenizer, **asked).nll
    parallel: Any = DataParallel(done.model)
    assert unirank.evaluate(parallel, tokenizer, **asked).nll == plain
    assert unirank.generate(parallel, tokenizer, "w1 w2") == unirank.generate(done.model, tokenizer, "w1 w2")
    record: Any = done
    with pytest.raises(unirank.InputError, match="got CompressedModel; its part model is one: give that"):
        unirank.evaluate(record, tokenizer, **asked)
    adapted: Any = peft.get_peft_model(
        done.model, peft.LoraConfig(r=2, target_modules=["left"], init_lora_weights=True)
    )
    assert unirank.evaluate(adapted, tokenizer, **asked).nll == pytest.approx(plain)
    for inside in (adapted, done.model):
        with pytest.raises(unirank.InputError, match=r"not merged.*merge_and_unload\(\)"):
            unirank.densify(inside)
    merged = adapted.merge_and_unload()
    assert unirank.densify(compiled(merged)) is merged


def test_a_compressed_model_of_which_a_part_is_not_in_memory_is_not_densified(
    make_model, calibration: unirank.Calibration
) -> None:
    model = unirank.compress(make_model(), 0.3, calibration=calibration).model
    with pytest.raises(unirank.InputError, match="is not in memory"):
        unirank.densify(cpu_offload(model))  # pyright: ignore[reportArgumentType]


def test_a_teacher_that_is_not_in_memory_is_refused(
    make_model, calibration: unirank.Calibration, text_file: Path, tmp_path: Path
) -> None:
    done = unirank.compress(make_model(), 0.3, calibration=calibration)
    settings = unirank.Finetune(steps=1, batch=2, window=24, distill=0.5)
    for against, said in ((cpu_offload(build("llama")), r"is not in memory.*Give against="), (object(), "got object")):
        wrong: Any = against
        with pytest.raises(unirank.InputError, match=said):
            unirank.finetune(done, str(text_file), settings, work=tmp_path / "work", against=wrong)


def test_a_merged_adapter_is_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    merged: Any = peft.get_peft_model(build("llama"), lora()).merge_and_unload()  # type: ignore[operator]
    assert unirank.describe(merged, tokenizer).linears == unirank.describe(build("llama"), tokenizer).linears


def test_a_model_that_is_sharded_over_processes_is_refused(group: None, tokenizer: PreTrainedTokenizerFast) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for wrapped in (
        fully_shard(build("llama"), mesh=mesh),
        FullyShardedDataParallel(build("llama"), device_id=torch.device("cpu")),
    ):
        with pytest.raises(unirank.InputError, match=r"spread over several processes\. Save the whole model"):
            unirank.describe(wrapped, tokenizer)  # pyright: ignore[reportArgumentType]


def test_a_model_left_on_the_disk_by_a_device_map_is_refused(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map=places, offload_folder=str(tmp_path / "off"))
    with pytest.raises(unirank.InputError, match=r"model\.layers\.1\.\S+ is not in memory.*with stream=True"):
        unirank.compress(model, 0.3, tokenizer=tokenizer, calibration=calibration)
