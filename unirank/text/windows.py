"""Texts and token windows, for calibration and for perplexity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from unirank.disk.hashing import sha256_text
from unirank.errors import InputError
from unirank.models.embeddings import embedding_rows
from unirank.text.files import LEGAL, kind_of, read_prose
from unirank.text.records import NAMED, is_records, read_documents, require_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = "builtin"
BUILTIN_HELD_OUT = "builtin-held-out"
# The first 70 % of Python's documentation calibrates, the last 20 % is held out; the gap between keeps them apart.
_CALIBRATION_SHARE, _HELD_OUT_SHARE = 0.7, 0.2


@dataclass(frozen=True)
class Text:
    """A text, where it came from, and its hash. `split` and `revision` are what was asked of a dataset."""

    name: str
    content: str
    split: str | None = None
    revision: str | None = None

    @property
    def sha256(self) -> str:
        return sha256_text(self.content)


def read_text(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    held_out: bool = False,
) -> Text:
    """Read a UTF-8 file, the documentation that ships with Python ("builtin", "builtin-held-out"), or records.

    Records (see `unirank.text.records.read_documents`, also for the other arguments) become one text. A text file may
    be gzipped (".gz").

    Raises InputError when the file is missing, is not UTF-8 text, is empty, or holds data that is no prose; when a
    split or revision is given for what has none; and like `read_documents`.
    """
    require_dataset(source, split, revision)
    if source in (BUILTIN, BUILTIN_HELD_OUT):
        from pydoc_data.topics import topics

        whole = "\n\n".join(topics[key] for key in sorted(topics))
        if source == BUILTIN:
            return Text(source, whole[: int(_CALIBRATION_SHARE * len(whole))])
        return Text(source, whole[-int(_HELD_OUT_SHARE * len(whole)) :])
    path = Path(source)
    if is_records(source):
        documents, separator = read_documents(source, tokenizer, split=split, revision=revision, held_out=held_out)
        return Text(path.name if path.is_file() else source, separator.join(documents), split, revision)
    if not path.is_file():
        raise InputError(
            f"The text {source!r} is not a file; legal are a path to {LEGAL}, {BUILTIN!r}, {BUILTIN_HELD_OUT!r}, "
            f"{', '.join(map(repr, NAMED))}, and a dataset's directory or hub name."
        )
    kind_of(path)  # refuses data that is not read
    return Text(path.name, read_prose(path))


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text, model: PreTrainedModel) -> torch.Tensor:
    """Tokenise the whole text at once, without special tokens: int64 `[tokens]` on the CPU.

    Raises InputError when a token of it has no embedding in `model`.
    """
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    check_tokens(tokens, tokenizer, model, f"The text {text.name}")
    return tokens


def check_tokens(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, where: str) -> None:
    """Raise InputError for a token without an embedding in `model`, which names the token and says what to do.

    A tokenizer may have more tokens than the model has embeddings (`[PAD]` was added, and nothing resized): such a
    model runs, as long as none of these tokens occurs.

    Args:
        tokens: integers of any shape.
        where: what they are, as the subject of a sentence.
    """
    rows = embedding_rows(model)
    beyond = tokens[tokens >= rows]
    if beyond.numel():
        first = int(beyond.flatten()[0])
        raise InputError(
            f"{where} has the token {tokenizer.convert_ids_to_tokens(first)!r} (id {first}), for which the model has "
            f"no embedding (it has {rows}); leave that token out, or give the dense model embeddings for all tokens "
            "with model.resize_token_embeddings(len(tokenizer))."
        )


def bos_of(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> int | None:
    """The BOS id when the tokenizer puts one in front by itself (Gemma, Llama 3), else None.

    Raises InputError when it has no embedding in `model`, where one is given.
    """
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int) or list(tokenizer("a").input_ids)[:1] != [bos]:
        return None
    if model is not None:
        check_tokens(torch.tensor([bos]), tokenizer, model, "The start of a window")
    return bos


def longest_window(model: PreTrainedModel) -> int | None:
    """How many tokens a window may have: as many as the model's table of positions has places; None without a table.

    Such a table is an embedding of positions (GPT-2, OPT), or a buffer that is as long as the configuration's
    `max_position_embeddings` and read by position (GPT-J). A rotary model computes its positions and runs beyond that
    number, so it has no longest window.
    """
    table = _position_table(model)
    return table[1] if table is not None else None


def fitting_window(model: PreTrainedModel, usual: int) -> int:
    """The window of a user who said nothing: `usual` tokens, or the model's longest window where that is shorter."""
    longest = longest_window(model)
    return usual if longest is None else min(usual, longest)


def check_window(model: PreTrainedModel, window: int, name: str = "window") -> None:
    """Raise InputError for a window, which the caller calls `name`, that is longer than `longest_window`."""
    table = _position_table(model)
    if table is not None and window > table[1]:
        raise InputError(
            f"{name} = {window} is not legal: {type(model).__name__} has a table of {table[1]} positions ({table[0]}), "
            f"so a window has at most {table[1]} tokens."
        )


def _position_table(model: PreTrainedModel) -> tuple[str, int] | None:
    """Name and places of the shortest table of absolute positions, found by its length; None where there is none."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    tables: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            # Some begin behind the padding index (RoBERTa); some have 2 places more, which they skip (OPT, BART).
            rows, skipped = module.num_embeddings, 0 if module.padding_idx is None else module.padding_idx + 1
            if positions <= rows <= positions + 2:
                tables[name] = min(positions, rows - skipped)
        shapes = [tuple(buffer.shape) for buffer in module.buffers(recurse=False)]
        for leaf, buffer in module.named_buffers(prefix=name, recurse=False):
            # Two of one shape are the cosines and sines of a rotary cache, which grows (**choice**).
            if buffer.dim() == 2 and buffer.shape[0] == positions and shapes.count(tuple(buffer.shape)) == 1:
                tables[leaf] = positions
    return min(tables.items(), key=lambda item: item[1], default=None)


def _check_length(tokens: torch.Tensor, window: int, needed: int, name: str) -> None:
    if window < 2:
        raise InputError(f"A window of {window} tokens is not legal; at least 2 are needed.")
    if len(tokens) < needed:
        raise InputError(
            f"The text {name} is too short: it has {len(tokens)} tokens, windows of {window} need at least {needed}."
        )


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    return windows if bos is None else torch.cat([windows.new_full((len(windows), 1), bos), windows], dim=1)


def calibration_windows(
    tokens: torch.Tensor, *, windows: int, window: int, seed: int, bos: int | None = None, name: str = "text"
) -> torch.Tensor:
    """Windows at uniformly random positions (`window_starts`): int64 `[windows, window]`.

    Raises InputError when the text is shorter than a window.
    """
    starts = window_starts(tokens, windows=windows, window=window, seed=seed, name=name)
    length = window - (bos is not None)  # BOS counts as one token of the window
    return _with_bos(torch.stack([tokens[start : start + length] for start in starts]), bos)


def window_starts(tokens: torch.Tensor, *, windows: int, window: int, seed: int, name: str = "text") -> list[int]:
    """Where calibration windows begin: `torch.randint(0, len - window, (windows,))` under `torch.Generator` seed `seed`
    (method 8).

    Raises InputError when the text is shorter than a window.
    """
    _check_length(tokens, window, window + 1, name)
    if windows < 1:
        raise InputError(f"windows = {windows} is not legal; at least 1 is needed.")
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(tokens) - window, (windows,), generator=generator).tolist()


def evaluation_windows(
    tokens: torch.Tensor, *, window: int, limit: int | None = None, bos: int | None = None, name: str = "text"
) -> torch.Tensor:
    """Non-overlapping windows from the start, the short tail dropped: int64 `[W, window]`, at most `limit`.

    Raises InputError when the text is shorter than a window.
    """
    _check_length(tokens, window, window, name)
    if limit is not None and limit < 1:
        raise InputError(f"limit = {limit} is not legal; at least 1 window is needed.")
    length = window - (bos is not None)
    count = len(tokens) // length
    return _with_bos(tokens[: count * length].view(count, length)[:limit], bos)
