"""Every architecture that we claim: a tiny random model is calibrated, compressed, saved, loaded again, generated from.

`pytest tests/test_architectures.py -v` is the table. Nothing in unirank knows these names; structure decides.
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
from tests.tiny import COMMON
from unirank.densify import densify
from unirank.errors import InputError
from unirank.modules import LowRankLinear
from unirank.types import DENSE

# Gemma's and others' windows are shorter than a calibration window, so that their masks matter.
SLIDING = {"sliding_window": 8}
OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}

# name: configuration, linears in a layer, and what is special about it
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any], int]] = {
    "llama, grouped queries": (T.LlamaConfig, {}, 7),
    "llama, one key head": (T.LlamaConfig, {"num_key_value_heads": 1}, 7),
    "mistral, sliding window": (T.MistralConfig, SLIDING, 7),
    "qwen2, biases of q, k, v": (T.Qwen2Config, {}, 7),
    "qwen3, norms of q and k": (T.Qwen3Config, {"head_dim": 8}, 7),
    "gemma2, norms before and after": (T.Gemma2Config, {"head_dim": 8} | SLIDING, 7),
    "gemma3, layers of two kinds": (T.Gemma3TextConfig, {"head_dim": 8} | SLIDING, 7),
    "phi3, fused qkv and gate-up": (T.Phi3Config, {}, 4),
    "phi, parallel": (T.PhiConfig, {}, 6),
    "gpt-neox, parallel": (T.GPTNeoXConfig, {}, 4),
    "gpt-neox, sequential": (T.GPTNeoXConfig, {"use_parallel_residual": False}, 4),
    "cohere, parallel": (T.CohereConfig, {}, 7),
    "cohere2, parallel, sliding window": (T.Cohere2Config, SLIDING, 7),
    "opt, biases and LayerNorm": (T.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}, 6),
    "gpt2, Conv1D": (T.GPT2Config, OLD, 4),
    "gptj, parallel": (T.GPTJConfig, OLD | {"rotary_dim": 4}, 6),
    "starcoder2": (T.Starcoder2Config, {}, 6),
    "olmo2, norms after": (T.Olmo2Config, {}, 7),
    "smollm3, layers without positions": (T.SmolLM3Config, {}, 7),
    "falcon, fused qkv": (T.FalconConfig, {}, 4),
    "bloom, alibi": (T.BloomConfig, {"n_layer": 3, "n_head": 4}, 4),
    "stablelm": (T.StableLmConfig, {}, 7),
    "granite": (T.GraniteConfig, {}, 7),
    "glm4, norms before and after": (T.Glm4Config, {"head_dim": 8}, 6),
}
# Their classes have no place for the biases that the scheme `afm` adds.
NO_PLACE = ("mistral", "qwen2", "qwen3", "gemma", "phi3", "cohere", "gptj", "olmo2", "stablelm", "glm4")
EXPERTS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mixtral": (T.MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (T.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
}


def build(cls: type[PretrainedConfig], changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cls(**(COMMON | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # wide, so that sublayers move the stream
    return model.eval()


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
def test_mixtures_of_experts_are_refused_in_one_sentence(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"Mixture-of-experts models are not supported: .* dense decoders\.$"):
        unirank.describe(build(*EXPERTS[name]), tokenizer, source=name)
