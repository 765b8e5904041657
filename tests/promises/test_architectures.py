"""Every architecture that we claim: a tiny random model is calibrated, compressed, saved, loaded again, generated from.

`pytest tests/promises/test_architectures.py -v` is the table. Nothing in unirank knows these names; structure decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

import unirank
from tests.support.architectures import ARCHITECTURES, NO_PLACE, build
from unirank.compression.densified import densify
from unirank.errors import InputError
from unirank.models.low_rank import LowRankLinear
from unirank.models.low_rank_experts import LowRankExperts
from unirank.types import DENSE

pytestmark = pytest.mark.slow

EXPERTS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mixtral": (T.MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (
        T.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 8},
    ),
}


def generated(model: Any, cache: bool) -> torch.Tensor:
    prompt = torch.arange(2, 14)[None]
    # Six tokens and no end, so that the cache is used and filled beyond the sliding windows.
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=cache, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compressed_saved_loaded_and_generated_from(
    name: str, tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    cls, changes, linears = ARCHITECTURES[name]
    store = None
    for allocator in ("unirank", "uniform"):
        loaded = unirank.describe(build(cls, changes), tokenizer, source=name)
        assert len(loaded.linears) == 3 * linears
        if store is None:
            store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
        plan = unirank.plan(store, 0.3, allocator=allocator)
        compressed = unirank.apply(loaded, store, plan)
        low_rank = [module for module in loaded.model.modules() if isinstance(module, LowRankLinear)]
        assert len(low_rank) == sum(rank != DENSE for rank in plan.ranks.values()) > 0
        out = compressed.save(tmp_path / allocator)
        again = AutoModelForCausalLM.from_pretrained(out)
        ids = torch.arange(2, 40)[None]
        with torch.no_grad():
            logits = again(ids).logits
            assert torch.equal(logits, loaded.model(ids).logits)
        assert logits.isfinite().all()
        tokens = generated(again, cache=True)
        assert tokens.shape == (1, 18)
        assert torch.equal(tokens, generated(again, cache=False))
        unirank.fuse(again)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["whiten", "afm"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_densified_it_is_a_plain_checkpoint_with_the_same_outputs(
    name: str, scheme: str, tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    cls, changes, _ = ARCHITECTURES[name]
    loaded = unirank.describe(build(cls, changes), tokenizer, source=name)
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    compressed = unirank.compress(loaded, 0.3, scheme=scheme, calibration=calibration)
    compressed.save(tmp_path / "small")
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        expected = compressed.model(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        if scheme == "afm" and name.startswith(NO_PLACE):
            with pytest.raises(InputError, match="has no place for the biases of"):
                densify(model)
            assert torch.equal(model(ids).logits, expected)  # untouched
            return
        densify(model).save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert type(again) is type(model)
        assert not any(isinstance(module, LowRankLinear) for module in again.modules())
        if scheme == "whiten":
            assert sum(parameter.numel() for parameter in again.parameters()) == size
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EXPERTS)
def test_mixtures_of_experts_too(
    name: str, tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path
) -> None:
    loaded = unirank.describe(build(*EXPERTS[name]), tokenizer, source=name)
    assert len(loaded.linears) == 3 * (4 + 2 * 4)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    compressed = unirank.apply(loaded, store, unirank.plan(store, 0.3, allocator="uniform"))
    low_rank = [module for module in loaded.model.modules() if isinstance(module, LowRankExperts)]
    assert len(low_rank) == 3
    again = AutoModelForCausalLM.from_pretrained(compressed.save(tmp_path / "out"))
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded.model(ids).logits)
    for cache in (False, True):
        assert torch.equal(generated(again, cache), generated(loaded.model, cache))
