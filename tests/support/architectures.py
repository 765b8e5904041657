"""Every architecture of the tests, tiny."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.support.tiny import COMMON

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


def build(cls: type[PretrainedConfig], changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cls(**(COMMON | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)  # wide, so that sublayers move the stream
    return model.eval()
