"""A real vLLM reads compressed checkpoints: the same log-probabilities as transformers, or one sentence.

`make test-vllm` installs vLLM into an environment of its own; elsewhere these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import unirank
from tests.support.served import SERVED, UNSERVED, of_transformers, of_vllm, with_adapter, write_checkpoint
from unirank.types import FORMS, Form

if importlib.util.find_spec("vllm") is None and not os.environ.get("UNIRANK_REQUIRE_VLLM"):
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

pytestmark = pytest.mark.slow
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else two processes want two NUMA nodes

PROMPTS = [[5, 17, 3, 80, 41, 9, 9, 22, 63, 50], [2, 90, 11], list(range(2, 40))]
# By dtype, and of a model whose dense weights differ as much: vLLM's GELU and soft caps are other formulas.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.01}
LOOSE = {"gemma2": 5e-3}

# What is served: the architecture, the form, the dtype, the scheme ("afm" adds biases).
PLAIN = [(name, form, "float32", "whiten") for name in SERVED for form in FORMS]
OTHERS = [("llama", form, dtype, "whiten") for form in FORMS for dtype in ("bfloat16", "float16")]
BIASED = [(name, form, "float32", "afm") for name in ("llama", "llama, biases", "gpt-neox") for form in FORMS]
CASES = [*PLAIN, *OTHERS, *BIASED]
QUANTISED = [(form, bits) for form in FORMS for bits in (8, 4)]
REFUSED = [(name, "factors", "float32", "whiten") for name in UNSERVED]


@dataclass(frozen=True)
class Made:
    """A checkpoint, and the log-probabilities that transformers gives the prompts."""

    folder: Path
    logprobs: list[list[float]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, text_file: Path) -> Any:
    """Every case that is asked for, before vLLM runs: it changes the classes of transformers that it serves through."""
    folder, found = tmp_path_factory.mktemp("served"), {}
    for index, case in enumerate([*CASES, *REFUSED]):
        architecture, form, dtype, scheme = case
        out = folder / str(index)
        write_checkpoint(out, architecture, tokenizer, text_file, form=form, scheme=scheme, dtype=getattr(torch, dtype))
        found[case] = Made(out, of_transformers(out, PROMPTS, dtype))
    for form, bits in QUANTISED:
        out = folder / f"{form}-{bits}"
        unirank.quantize(found["llama", form, "float32", "whiten"].folder, bits).save(out)
        found[form, bits] = Made(out, of_transformers(out, PROMPTS, "float32"))
    return found


def off(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The largest difference of a log-probability."""
    return max(abs(a - b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_vllm_says_what_transformers_says(case: tuple[str, Form, str, str], made: Any) -> None:
    folder, theirs = made[case].folder, made[case].logprobs
    assert off(of_vllm(folder, PROMPTS, case[2]), theirs) < LOOSE.get(case[0], TOLERANCE[case[2]])


def test_compiled_as_by_default(made: Any) -> None:
    """vLLM compiles the whole graph and fails where it breaks."""
    case = ("llama", "pivoted", "float32", "whiten")
    said = of_vllm(made[case].folder, PROMPTS, "float32", enforce_eager=False)
    assert off(said, made[case].logprobs) < TOLERANCE["float32"]


@pytest.mark.parametrize(("form", "bits"), QUANTISED)
def test_quantised_weights_are_multiplied_as_torchao_does(form: Form, bits: int, made: Any) -> None:
    assert off(of_vllm(made[form, bits].folder, PROMPTS, "float32"), made[form, bits].logprobs) < TOLERANCE["float32"]


def change_config(folder: Path, **changes: Any) -> None:
    """Change the checkpoint's quantization_config; None takes a key out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    method = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in method.items() if value is not None}
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the checkpoint's tensors."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


Q1 = "model.layers.1.self_attn.q_proj"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a factor is missing": (
        lambda out: change_tensors(out, lambda t: t.pop(f"{Q1}.left.weight")),
        f"no weights for {Q1}.left.weight",
    ),
    "a linear is missing": (
        lambda out: change_tensors(out, lambda t: [t.pop(name) for name in list(t) if name.startswith(Q1)]),
        "weights for 2 of the linears",
    ),
    "the guard is missing": (
        lambda out: change_tensors(out, lambda t: t.pop(f"{Q1}.weight")),
        f"{Q1} has rank .* hold nothing",
    ),
    "a rank does not fit": (
        lambda out: change_config(out, ranks=ranks_of(out) | {Q1: ranks_of(out)[Q1] + 1}),
        f"{Q1} has rank .* weights hold rank",
    ),
    "a linear that is not there": (
        lambda out: change_config(out, ranks=ranks_of(out) | {"model.layers.9.mlp.up_proj": 3}),
        "no linear model.layers.9.mlp.up_proj",
    ),
    "another version": (lambda out: change_config(out, blocks=4), "has 'blocks', which this unirank does not know"),
    "an illegal form": (lambda out: change_config(out, form="thirds"), "form = 'thirds' is not legal"),
    "another method": (lambda out: change_config(out, quant_method="other"), "other"),
}


def ranks_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_is_damaged_or_foreign_is_one_sentence(damage: str, made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made["llama", "factors", "float32", "whiten"].folder, out)
    change, said = DAMAGED[damage]
    change(out)
    with pytest.raises(Exception, match=said):
        of_vllm(out, PROMPTS, "float32")


@pytest.mark.parametrize("form", FORMS)
def test_an_added_bias_that_is_missing_is_one_sentence(form: Form, made: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made["llama", form, "float32", "afm"].folder, out)
    change_tensors(out, lambda t: t.pop(f"{Q1}.left.bias" if form == "factors" else f"{Q1}.bias"))
    with pytest.raises(Exception, match=f"no bias for {Q1}"):
        of_vllm(out, PROMPTS, "float32")


def test_a_dense_checkpoint_is_not_taken_for_ours(made: Any, tmp_path: Path) -> None:
    """--quantization unirank on a checkpoint of no method."""
    out = tmp_path / "dense"
    model = AutoModelForCausalLM.from_pretrained(made["llama", "factors", "float32", "whiten"].folder)
    unirank.densify(model).save_pretrained(out)
    with pytest.raises(Exception, match="no quantization_config of unirank"):
        of_vllm(out, PROMPTS, "float32", quantization="unirank")


@pytest.mark.parametrize("architecture", ["bloom", "falcon, groups"])
def test_an_order_that_is_not_known_is_refused(architecture: str, made: Any) -> None:
    """q, k and v lie by head in one matrix, and vLLM reorders the dense one while it reads."""
    with pytest.raises(Exception, match="unirank densify"):
        of_vllm(made[architecture, "factors", "float32", "whiten"].folder, PROMPTS, "float32")


def test_an_adapter_on_top(made: Any, tmp_path: Path) -> None:
    """A LoRA adapter of the dense model's names (q, o and up) is added to what the factors make."""
    folder, torch_seed = made["llama", "pivoted", "float32", "whiten"].folder, torch.Generator().manual_seed(3)
    model = unirank.densify(AutoModelForCausalLM.from_pretrained(folder))
    tensors = {}
    targets = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    for name in (f"model.layers.{layer}.{target}" for layer in range(2) for target in targets):
        weight = model.get_parameter(f"{name}.weight")
        down = torch.randn(8, weight.shape[1], generator=torch_seed) * 0.1
        up = torch.randn(weight.shape[0], 8, generator=torch_seed) * 0.1
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        weight.data += up @ down
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": [t.split(".")[1] for t in targets]}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    model.save_pretrained(tmp_path / "tuned")
    for prompt, (tokens, said) in zip(PROMPTS, with_adapter(folder, PROMPTS, adapter, 6), strict=True):
        (wanted,) = of_transformers(tmp_path / "tuned", [[*prompt, *tokens]], "float32")
        assert off([said], [wanted[-len(tokens) :]]) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "case", [("llama", "pivoted", "float32", "afm"), ("phi3", "factors", "float32", "whiten")], ids=", ".join
)
def test_split_over_two_processes(case: tuple[str, Form, str, str], made: Any) -> None:
    """Tensor parallelism of 2: heads, columns and rows are split, biases are added once."""
    said = of_vllm(made[case].folder, PROMPTS, "float32", tensor_parallel_size=2, distributed_executor_backend="mp")
    assert off(said, made[case].logprobs) < TOLERANCE["float32"]
