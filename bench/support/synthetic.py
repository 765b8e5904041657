"""Random Llamas of any size with a word tokenizer, for benchmarks that need no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import unirank
from unirank.types import LoadedModel

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(254))]


def llama(*, hidden: int, layers: int, heads: int = 4, device: torch.device | None = None) -> LoadedModel:
    """A random float32 Llama: MLP of 8/3 the width, half as many key-value heads as heads; None is the CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    if device is not None:
        model.to(device)  # pyright: ignore[reportArgumentType]
    return unirank.describe(model.eval(), tokenizer(), source=f"random Llama {hidden} x {layers}")


def tokenizer() -> PreTrainedTokenizerFast:
    """Of `WORDS`, split at spaces."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def text(folder: Path, words: int = 20000) -> Path:
    """A file of random words."""
    order = torch.randint(2, len(WORDS), (words,), generator=torch.Generator().manual_seed(1))
    path = folder / "words.txt"
    path.write_text(" ".join(WORDS[i] for i in order.tolist()), encoding="utf-8")
    return path
