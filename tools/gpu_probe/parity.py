"""Step parity: every stage of the path on tiny models, against the CPU; the checks of tests/gpu, with their figures."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.on_device import CHECKS, Bench
from tests.support.tiny import WORDS
from tools.gpu_probe.answers import Probe

FEW = ("llama", "gpt2", "scheme kfac", "bfloat16", "saved and opened", "second pass", "resumed", "streamed")


def parity(probe: Probe) -> None:
    """All checks; with --tiny a few."""
    folder = probe.folder()
    text, tokenizer = words(folder, WORDS, 4000)
    for name in FEW if probe.tiny else CHECKS:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        bench = Bench(probe.at, place, tokenizer, text)
        probe.attempt(name, lambda name=name, bench=bench: CHECKS[name](bench))


def words(folder: Path, known: list[str], count: int) -> tuple[Path, PreTrainedTokenizerFast]:
    """A file of `count` random words, and the tokenizer that knows them."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    order = torch.randint(2, len(known), (count,), generator=torch.Generator().manual_seed(1))
    path = folder / "words.txt"
    path.write_text(" ".join(known[i] for i in order.tolist()))
    return path, tokenizer
