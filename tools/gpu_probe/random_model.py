"""A random bfloat16 Llama of a published shape on the device, and a text for it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import unirank
from tools.gpu_probe.answers import Probe
from tools.gpu_probe.parity import words
from unirank.types import LoadedModel

# hidden, mlp, heads, key-value heads, layers: of Llama 2 7B, Llama 3.2 1B, and one that a CPU does in seconds
SHAPES = {"7b": (4096, 11008, 32, 32, 32), "1b": (2048, 8192, 32, 8, 16), "tiny": (64, 160, 4, 2, 2)}
_VOCABULARY, _TINY = 32000, 256
_WORDS, _FEW = 600_000, 3000  # of the text: 256 windows of 2048 tokens, and 8 of 64


def depth(probe: Probe) -> int:
    """Layers of the whole model."""
    return SHAPES[probe.shape][4]


def calibration(probe: Probe, text: Path) -> unirank.Calibration:
    """`probe.windows` windows of 2048 tokens; tiny: 8 of 64."""
    count, window, batch = (8, 64, 4) if probe.tiny else (probe.windows, 2048, 8)
    return unirank.Calibration(text=str(text), windows=count, window=window, batch=batch)


def random_model(probe: Probe, layers: int | None, work: Path) -> tuple[LoadedModel, Path]:
    """With `layers` of its layers; None: all. The text is in `work`."""
    hidden, mlp, heads, kv, deep = SHAPES[probe.shape]
    vocabulary = _TINY if probe.tiny else _VOCABULARY
    known = ["<unk>", "<eos>", *(f"w{i}" for i in range(vocabulary - 2))]
    text, tokenizer = words(work, known, _FEW if probe.tiny else _WORDS)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_hidden_layers=layers or deep,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with probe.at:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 2:  # as wide as trained ones: streams neither vanish nor explode
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return unirank.describe(model.eval(), tokenizer, source=f"random {probe.shape}"), text
