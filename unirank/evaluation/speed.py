"""Tokens a second: of reading a prompt, and of writing behind it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unirank.disk.strictjson import Damaged, build, number
from unirank.errors import InputError
from unirank.models.wrappers import runnable
from unirank.progress import OnProgress, silent
from unirank.provenance import device_name
from unirank.text.windows import check_tokens, longest_window

PROMPT, STEPS, TURNS = 128, 16, 3  # tokens read, tokens written, timed turns (**choice**: seconds for a small model)
_SHORT = 8  # tokens before those that are written, so that reading them costs next to nothing
# What is read has no influence on the time; that it is plain text keeps special tokens out, which some models act on.
_TEXT = "The quick brown fox jumps over the lazy dog, and then it looks for another one to jump over. "


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one model with one sequence at a time, and what they depend on.

    Attributes:
        prefill: tokens a second while a prompt of `prompt` tokens is read, up to the first new token.
        decode: new tokens a second while `steps` of them are written, with the cache.
        turns: how often each was timed; the figures are medians.
        spread: seconds of the slowest turn over those of the fastest, in the phase where that is more; 1 is an idle
            machine, and far above it, the figures say little.
        device: "cpu", or the GPU's name.
        threads: of torch.
    """

    prefill: float
    decode: float
    prompt: int
    steps: int
    turns: int
    spread: float
    device: str
    dtype: str
    threads: int

    @property
    def rates(self) -> dict[str, float]:
        """Tokens a second by phase: "prefill", "decode"."""
        return {"prefill": self.prefill, "decode": self.decode}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Speed:
        """Read `as_dict`'s result. Raises Damaged for anything else."""
        speed = build(cls, record)
        for one in fields(cls):
            value = getattr(speed, one.name)
            legal = number(value, one.name) > 0 if one.type == "float" else type(value).__name__ == one.type
            if not legal:
                raise Damaged(f"{one.name} is {str(value)[:80]!r}")
        return speed


def tokens_per_second(
    models: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    *,
    prompt: int = PROMPT,
    steps: int = STEPS,
    turns: int = TURNS,
    stage: str = "speed",
    progress: OnProgress = silent,
) -> tuple[Speed, ...]:
    """Tokens a second of each model as `generate` gives them, greedily, one sequence at a time.

    The models take turns, so that a busy machine slows all of them alike; one more turn at the start warms up. So all
    are in memory at once. Figures from two calls are not comparable unless the machine was idle in both.

    Args:
        models: each with its tokenizer.
        prompt: tokens to read, fewer where a model has positions for fewer (`longest_window`).
        steps: tokens to write, in the same limit.
        turns: timed turns, at least 1.

    Raises InputError where a number is less than 1, or a model does not write as many tokens as it was asked for.
    """
    for name, value in (("prompt", prompt), ("steps", steps), ("turns", turns)):
        if value < 1:
            raise InputError(f"{name} = {value} is not legal; it is at least 1.")
    running = [_Timed(runnable(model), tokenizer, prompt, steps) for model, tokenizer in models]
    seconds = [{"prefill": [], "decode": []} for _ in running]
    progress(stage, 0, turns + 1)
    for turn in range(turns + 1):  # the first warms up
        for one, kept in zip(running, seconds, strict=True):
            for phase, run in (("prefill", one.read), ("decode", one.write)):
                kept[phase] += [_seconds(run, one.model.device)] if turn else _warmed(run)
        progress(stage, turn + 1, turns + 1)
    return tuple(one.speed(kept) for one, kept in zip(running, seconds, strict=True))


class _Timed:
    """One model with what it reads."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: int, steps: int) -> None:
        model.eval()
        longest = longest_window(model)
        room = prompt + _SHORT + steps if longest is None else longest
        self.model, self.prompt = model, min(prompt, room - 1)
        self.steps = min(steps, max(room - _SHORT, 1))
        text = tokenizer(_TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
        check_tokens(text, tokenizer, model, "The text that speed is measured on")
        self._ids = text.repeat(1, -(-self.prompt // text.shape[1]))[:, : self.prompt].to(model.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._more = {"do_sample": False, "pad_token_id": 0 if pad is None else pad}

    def read(self) -> None:
        self._generate(self._ids, 1)

    def write(self) -> None:
        self._generate(self._ids[:, : min(_SHORT, self.prompt)], self.steps)

    @torch.no_grad()
    def _generate(self, ids: torch.Tensor, count: int) -> None:
        run = cast("Callable[..., torch.Tensor]", self.model.generate)
        mask = torch.ones_like(ids)
        # Without the least number, a model that writes an end of text early would seem fast.
        got = run(input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **self._more)
        if got.shape[1] - ids.shape[1] != count:
            raise InputError(
                f"{type(self.model).__name__} wrote {got.shape[1] - ids.shape[1]} tokens, not {count}; its speed "
                "cannot be measured."
            )

    def speed(self, seconds: Mapping[str, Sequence[float]]) -> Speed:
        return Speed(
            prefill=self.prompt / statistics.median(seconds["prefill"]),
            decode=self.steps / statistics.median(seconds["decode"]),
            prompt=self.prompt,
            steps=self.steps,
            turns=len(seconds["decode"]),
            spread=max(max(times) / min(times) for times in seconds.values()),
            device=device_name(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )


def _warmed(run: Callable[[], None]) -> list[float]:
    run()
    return []


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
