"""A compressed checkpoint opens as what transformers makes of its class: the body alone, and under other heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import unirank
from tests.support.every_decoder import build as build_any
from tests.support.tiny import build
from unirank.models.low_rank import LowRankLinear

IDS = torch.arange(2, 22)[None]
# Scheme and form: biases are named in the configuration too, and the pivoted form has a tensor more.
MADE: dict[str, tuple[str, Any]] = {
    "llama": ("afm", "pivoted"),
    "gpt2": ("whiten", "factors"),
    "opt": ("whiten", "factors"),
    "gemma3": ("whiten", "factors"),
}


def hidden(model: PreTrainedModel) -> torch.Tensor:
    """What leaves the body."""
    with torch.no_grad():
        return model.base_model(IDS).last_hidden_state


def low_rank(model: PreTrainedModel) -> int:
    return sum(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer: PreTrainedTokenizerFast, text_file: Path) -> Path:
    """Compressed causal language models by their names; "body", of a Llama's body, and "base", its original."""
    root = tmp_path_factory.mktemp("classes")
    calibration = unirank.Calibration(text=str(text_file), windows=8, window=16, batch=2)
    for name, (scheme, form) in MADE.items():
        model = build_any("gemma3") if name == "gemma3" else build(name)  # a multimodal model, with its wrapper
        made = unirank.compress(model, 0.4, tokenizer=tokenizer, scheme=scheme, form=form, calibration=calibration)
        made.save(root / name)
    build("llama").save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    body = AutoModel.from_pretrained(root / "base")
    unirank.compress(body, 0.4, tokenizer=tokenizer, calibration=calibration).save(root / "body")
    return root


@pytest.mark.parametrize("name", MADE)
def test_the_body_opens_and_computes_the_same(name: str, saved: Path, tmp_path: Path) -> None:
    whole, body = AutoModelForCausalLM.from_pretrained(saved / name), AutoModel.from_pretrained(saved / name)
    assert low_rank(body) == low_rank(whole) > 0
    assert torch.equal(hidden(body), hidden(whole))
    # Saved again it says of itself what is true of it, and opens both ways.
    body.save_pretrained(tmp_path / "body")
    named = json.loads((tmp_path / "body" / "config.json").read_text())["quantization_config"]
    assert set(named["ranks"]) == {path for path, one in body.named_modules() if isinstance(one, LowRankLinear)}
    assert set(named.get("biased", [])) <= set(named["ranks"])
    assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / "body")), hidden(whole))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, whole(IDS).logits)  # the heads are tied


@pytest.mark.parametrize("name", MADE)
def test_another_head_opens_trains_and_is_saved(name: str, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved / name, num_labels=3)
    assert torch.equal(hidden(model), hidden(AutoModelForCausalLM.from_pretrained(saved / name)))
    model.config.get_text_config().pad_token_id = 1
    model(IDS, labels=torch.tensor([2])).loss.backward()
    gradient: Any = next(module for module in model.modules() if isinstance(module, LowRankLinear)).left.weight.grad
    assert gradient.abs().sum() > 0
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_body_that_was_compressed_opens_under_heads(saved: Path) -> None:
    body = AutoModel.from_pretrained(saved / "body")
    for cls in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = cls.from_pretrained(saved / "body")
        assert low_rank(model) == low_rank(body) > 0
        assert torch.equal(hidden(model), hidden(body))


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_that_was_compressed_is_opened_and_gone_on_with(
    stream: bool, saved: Path, text_file: Path, tmp_path: Path
) -> None:
    """Names in its plan are those of the model that is opened."""
    opened = unirank.open_compressed(saved / "body", device="cpu", stream=stream)
    before = unirank.RankPlan.from_json((saved / "body" / "rank_plan.json").read_text())
    assert list(opened.plan.ranks) == [f"model.{name}" for name in before.ranks]
    assert (opened.plan.used, opened.plan.total) == (before.used, before.total)
    assert opened.save(tmp_path / "again").is_dir()
    calibration = unirank.Calibration(text=str(text_file), windows=8, window=16, batch=2)
    again = unirank.open_compressed(tmp_path / "again", device="cpu", stream=stream)
    healed = unirank.heal(again, calibration, unirank.Heal(passes=1), work=tmp_path / "work", against=saved / "base")
    assert healed.plan == opened.plan
    if not stream:
        tuned = unirank.finetune(
            healed, str(text_file), unirank.Finetune(steps=1, batch=2, window=16), work=tmp_path / "tuning"
        )
        assert tuned.plan == opened.plan
    dense = unirank.densify(unirank.open_compressed(saved / "body", device="cpu").model)
    assert low_rank(dense) == 0
    torch.testing.assert_close(hidden(dense), hidden(AutoModel.from_pretrained(saved / "body")), rtol=1e-4, atol=1e-4)
