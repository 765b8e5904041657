"""A tiny Llava, trained here to name the colour of a picture and to go on with text: what text alone calibrates.

    python -m bench.quality.bench_towers --json towers.json

The text is made up: every word has two successors. Printed for the dense model and for presets at several removed
fractions: perplexity on other text, and how many of 120 noisy pictures of 6 colours are named rightly. Calibration
sees no picture. Towers and projector are compared to the bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import unirank
from bench.support.record import write_result

WORDS = 96
IMAGE = WORDS  # the token that stands for a patch
SIDE, PATCH = 16, 4
PATCHES = (SIDE // PATCH) ** 2
COLOURS = (
    (0.8, -0.8, -0.8),
    (-0.8, 0.6, -0.7),
    (-0.8, -0.8, 0.7),
    (0.9, 0.9, 0.9),
    (-0.9, -0.9, -0.9),
    (0.8, 0.7, -0.8),
)
FIRST = 10  # the word of the first colour; the others follow
WINDOW, BATCH = 32, 12


def make_model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=WORDS + 1, intermediate_size=48, num_hidden_layers=3, **sizes)
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, intermediate_size=128, num_hidden_layers=3, **sizes)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<eos>", *(f"w{index}" for index in range(2, WORDS)), "<image>"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def made_up(length: int, seed: int) -> torch.Tensor:
    """Words, int64 `[length]`, each one of two that may follow the one before."""
    follow = torch.randint(2, WORDS, (WORDS, 2), generator=torch.Generator().manual_seed(3)).tolist()
    choices = torch.randint(0, 2, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    words = [5]
    for choice in choices[1:]:
        words.append(follow[words[-1]][choice])
    return torch.tensor(words)


def pictures(colours: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A noisy picture of each of `colours`, int64 `[B]`, and the prompt that asks for it."""
    plain = torch.tensor(COLOURS)[colours][:, :, None, None]
    noise = 0.2 * torch.randn(len(colours), 3, SIDE, SIDE, generator=generator)
    prompt = torch.tensor([2, *[IMAGE] * PATCHES, 5])
    return {"input_ids": prompt.expand(len(colours), -1), "pixel_values": plain + noise}


def train(model: Any, text: torch.Tensor, steps: int) -> float:
    """Half on pictures, half on text; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    loss = torch.zeros(())
    for _ in range(steps):
        colours = torch.randint(0, len(COLOURS), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(**pictures(colours, generator)).logits[:, -1], FIRST + colours)
        first = torch.randint(0, len(text) - WINDOW, (BATCH,), generator=generator)
        ids = torch.stack([text[i : i + WINDOW] for i in first.tolist()])
        loss = loss + F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return float(loss.detach())


@torch.no_grad()
def named(model: Any) -> int:
    """How many of 120 pictures get the word of their colour."""
    colours = torch.arange(120) % len(COLOURS)
    inputs = pictures(colours, torch.Generator().manual_seed(1))
    return int((model(**inputs).logits[:, -1].argmax(-1) == FIRST + colours).sum())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--presets", default="unirank,fast")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    arguments = parser.parse_args(argv)
    steps = 3 if arguments.quick else arguments.steps
    model, tokenizer, text = make_model(), make_tokenizer(), made_up(40_000, 1)
    start = time.monotonic()
    loss = train(model, text, steps)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters; {steps} steps in {time.monotonic() - start:.0f} s, loss {loss:.2f} at the end")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="unirank-") as scratch:
        root = Path(scratch)
        for name, words in (("calibration", text), ("held-out", made_up(4_000, 2))):
            (root / f"{name}.txt").write_text(" ".join(f"w{word}" for word in words.tolist()))
        model.save_pretrained(root / "dense")
        tokenizer.save_pretrained(root / "dense")

        def note(removed: float, preset: str, folder: Path) -> dict[str, torch.Tensor]:
            opened: Any = AutoModelForImageTextToText.from_pretrained(folder)
            found = unirank.evaluate(opened, tokenizer, text=str(root / "held-out.txt"), window=64, limit=16)
            row = {"removed": removed, "preset": preset, "perplexity": found.perplexity, "named": named(opened)}
            rows.append(row)
            print(f"{removed:4.0%}  {preset:10} {found.perplexity:8.3f}  {row['named']:3} of 120", flush=True)
            state = opened.state_dict()
            return {name: state[name] for name in state if "vision_tower" in name or "projector" in name}

        towers = note(0.0, "dense", root / "dense")
        calibration = unirank.Calibration(text=str(root / "calibration.txt"), windows=64, window=64, batch=8)
        for preset in arguments.presets.split(","):
            for removed in (0.1, 0.2, 0.3):
                made = unirank.compress(
                    root / "dense", removed, preset=preset, calibration=calibration, store=root / preset, device="cpu"
                )
                after = note(removed, preset, made.save(root / f"{preset}-{removed}"))
                assert towers.keys() == after.keys()
                assert all(torch.equal(tensor, after[name]) for name, tensor in towers.items())
    print(f"{len(towers)} tensors of tower and projector are the same to the bit in all of them")
    if arguments.json is not None:
        write_result(arguments.json, rows, parameters=size, steps=steps, loss=loss)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
