"""A compressed checkpoint is used like any other: what transformers offers works on it, or is refused clearly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

import unirank
from unirank.models.low_rank import LowRankLinear

pytestmark = pytest.mark.slow

IDS = torch.arange(2, 30)[None]


@pytest.fixture
def small(make_model, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    """A tiny Llama, 40 % removed, with biases that its class does not have."""
    return unirank.compress(make_model(), 0.4, scheme="afm", calibration=calibration).save(tmp_path / "small")


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(small: Path, device_map: Any) -> None:
    assert torch.equal(logits(load(small, device_map=device_map)), logits(load(small)))


def test_shards(small: Path, tmp_path: Path) -> None:
    load(small).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "shards")), logits(load(small)))


def test_dtype(small: Path) -> None:
    model = load(small, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    torch.testing.assert_close(logits(model).float(), logits(load(small)), rtol=0.1, atol=0.15)


def test_gradient_checkpointing(small: Path) -> None:
    model = load(small).train()
    plain = torch.autograd.grad(model(IDS, labels=IDS).loss, list(model.parameters()))
    # transformers 5 renamed it on the way.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    again = torch.autograd.grad(model(IDS, labels=IDS, use_cache=False).loss, list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_compile_sees_one_graph(small: Path) -> None:
    model = load(small)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_pipeline(small: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small)
    run = pipeline("text-generation", model=load(small), tokenizer=tokenizer)
    text = run("w1 w2 w3", max_new_tokens=4, pad_token_id=1)[0]["generated_text"]
    assert text.startswith("w1 w2 w3")
    assert len(text) > len("w1 w2 w3")


def test_pushing_uploads_the_whole_checkpoint(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, bytes] = {}

    def upload(_self: Any, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        sent.update({file.name: file.read_bytes() for file in folder_path.iterdir()})
        return f"address of {repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda _self, name, **_: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert unirank.open_compressed(small, device="cpu").push_to_hub("small") == "address of me/small"
    expected = {file.name: file.read_bytes() for file in small.iterdir()}
    assert sent.keys() == expected.keys()
    sent.pop("tokenizer_config.json")  # transformers notes in it that it was read from a directory
    assert all(expected[name] == content for name, content in sent.items())


def test_quantising_the_factors_while_loading_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match="quantized with UniRankConfig but you are passing a BitsAndBytesConfig"):
        load(small, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_the_loaded_model_is_made_of_low_rank_layers(small: Path) -> None:
    assert any(isinstance(module, LowRankLinear) for module in load(small).modules())


def test_any_program_can_be_run_with_unirank_imported(small: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(__name__, type(model.model.layers[1].mlp.down_proj).__name__)\n"
    )

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unirank.run", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("program", small).stdout == "__main__ LowRankLinear\n"
    missing = run("nowhere")
    assert missing.returncode == 1
    assert missing.stderr.endswith("unirank.run: there is no module 'nowhere' to run.\n")
    assert run("--help").stdout.startswith("Any program that loads models")
