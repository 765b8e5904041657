"""Configurations of tiny models, and the words of the tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unirank.analysis.identity import Identity

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(94))]
COMMON: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def _config(cls: type, **fixed: Any):
    def make(**changes: Any):
        return cls(**(COMMON | fixed | changes))

    return make


CONFIGS = {
    "llama": _config(LlamaConfig, tie_word_embeddings=True),
    "llama-bias": _config(LlamaConfig, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    # Layer types alternate, so that masks and position embeddings differ by layer; the window is shorter than a text.
    "gemma3": _config(
        Gemma3TextConfig,
        head_dim=8,
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "gpt-neox": _config(GPTNeoXConfig, use_parallel_residual=True),
    "gpt2": lambda **changes: GPT2Config(
        **(
            {
                "vocab_size": len(WORDS),
                "n_embd": 32,
                "n_layer": 3,
                "n_head": 4,
                "n_positions": 256,
                "bos_token_id": 1,
                "eos_token_id": 1,
                "pad_token_id": 1,
            }
            | changes
        )
    ),
    "opt": _config(OPTConfig, ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": _config(MixtralConfig, num_local_experts=4),
}


def made_up_identity(scheme: str = "svd", **calibration: Any) -> Identity:
    """The identity of an analysis that never was, with all that a store asks of one."""
    plain = {"text": "t", "windows_sha256": "w", "windows": 1, "window": 7, "seed": 0, "batch": 1}
    return Identity.from_dict(
        {
            "model": {"class": "M", "weights_sha256": "abc", "dtype": "float32"},
            "calibration": plain | calibration,
            "versions": {"unirank": "0"},
            "scheme": scheme,
        }
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer of 96 words, without BOS."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def write_words(path: Path) -> Path:
    """4000 random words."""
    order = torch.randint(2, len(WORDS), (4000,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(WORDS[i] for i in order.tolist()))
    return path


def build(name: str, **changes: object) -> PreTrainedModel:
    """A tiny random float32 model of the architecture `name` (a key of `tests.tiny.CONFIGS`)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**changes))
    for parameter in model.parameters():
        # Wider than the usual 0.02, so that sublayers move the stream and no cosine is trivially 1.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def save_dense(path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of two layers with its tokenizer, as a checkpoint at `path`."""
    build("llama", num_hidden_layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
