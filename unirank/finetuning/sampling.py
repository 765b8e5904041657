"""Windows that a model writes itself: what distillation reads beside the calibration text.

A text that was made for calibration says little about others. What the dense model writes, from tokens drawn at random,
is of every kind that it was trained on (**choice**; the idea is LLM-QAT's, arXiv 2305.17888, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria

from unirank.disk.strictjson import Damaged
from unirank.disk.tensorfile import open_tensors, write_tensors
from unirank.errors import InputError, first_line, is_out_of_memory
from unirank.progress import OnProgress
from unirank.text.windows import bos_of

_TEMPERATURE = 0.9  # a little below what the model says, which in small models keeps texts readable (choice)
_AT_ONCE = 16384  # tokens: more need more memory for their keys and values, and take less time (choice)
_STAGE = "sample"


def check_can_sample(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a model that cannot write; it writes two tokens."""
    try:
        _written(model, _ordinary(model, tokenizer)[:1, None], 3, 0, lambda _: None)
    except InputError:
        raise
    except Exception as error:  # it is the model's own code, which may do anything
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{type(model).__name__} cannot generate text ({first_line(error)}), so it cannot write windows for "
            "distillation; set distill_sampled to 0."
        ) from error


def sample(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int,
    window: int,
    seed: int,
    folder: Path,
    progress: OnProgress,
) -> torch.Tensor:
    """Windows, int64 `[W, window]` on the CPU, that `model` writes; parts that are in `folder` are read there.

    Each begins with BOS, where the tokenizer puts one in front of a text, and a token drawn at random from those that
    are no special ones; where a text ends, another follows.
    """
    bos, ordinary = bos_of(tokenizer), _ordinary(model, tokenizer)
    folder.mkdir(exist_ok=True)
    parts, most = [], max(1, _AT_ONCE // window)
    for number, start in enumerate(range(0, windows, most)):
        file, count = folder / f"sampled-{number:05d}.safetensors", min(most, windows - start)
        try:
            with open_tensors(file) as kept:
                parts.append(kept["ids"])
                continue
        except Damaged:
            pass  # not there yet
        own = ((seed << 20) + number) % 2**63  # no part of another seed has the same
        generator = torch.Generator().manual_seed(own)
        first = ordinary[torch.randint(len(ordinary), (count, 1), generator=generator)]
        if bos is not None:
            first = torch.cat([first.new_full((count, 1), bos), first], dim=1)

        def done(length: int, before: int = start * window, count: int = count) -> None:
            progress(_STAGE, before + count * length, windows * window)

        ids = _written(model, first[:, :window], window, own, done)
        write_tensors(file, {"ids": ids}, {})
        parts.append(ids)
    progress(_STAGE, windows * window, windows * window)
    return torch.cat(parts)


def _vocabulary(model: torch.nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _ordinary(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The tokens that are no special ones, and have an embedding; int64, ascending."""
    special, end = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}, _vocabulary(model)
    found = sorted(token for token in tokenizer.get_vocab().values() if token < end and token not in special)
    if not found:
        raise InputError(
            "All tokens of the tokenizer are special ones, so a text can begin with none; set distill_sampled to 0."
        )
    return torch.tensor(found)


def _written(
    model: torch.nn.Module, first: torch.Tensor, window: int, seed: int, done: Callable[[int], object]
) -> torch.Tensor:
    """`first` `[W, t]`, continued to `window` tokens."""
    if first.shape[1] == window:
        return first
    device = next(model.parameters()).device
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), _plain_sampling(model):
        torch.manual_seed(seed)
        ids = first.to(device)
        attention_mask = torch.ones_like(ids)
        written = model.generate(
            ids, attention_mask=attention_mask, max_new_tokens=window - ids.shape[1], stopping_criteria=[_Told(done)]
        )  # pyright: ignore[reportCallIssue]
    return written.cpu().contiguous()


class _Told(StoppingCriteria):
    """Ends nothing: tells how long the windows are."""

    def __init__(self, done: Callable[[int], object]) -> None:
        self._done = done

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        del scores
        self._done(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _plain_sampling(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `generate` samples from all tokens, whatever the model's own configuration says, and never ends early."""
    before = model.generation_config
    # No token has the number of the end: a text that ends is followed by the next, as in training.
    plain = {"do_sample": True, "temperature": _TEMPERATURE, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    model.generation_config = GenerationConfig(**plain, eos_token_id=_vocabulary(model))  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    try:
        yield
    finally:
        model.generation_config = before  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
