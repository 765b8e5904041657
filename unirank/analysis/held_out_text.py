"""A text to measure on where the user names none: what the calibration windows left of the calibration text."""

from __future__ import annotations

import torch

from unirank.analysis.calibration import Calibration, texts_of, windows_each
from unirank.errors import InputError
from unirank.text.windows import fitting_window, tokenize, window_starts
from unirank.types import LoadedModel

_WINDOW, _WINDOWS = 1024, 16  # as much as 16 windows of perplexity read (**choice**)
_PIECE = 256  # tokens: shorter stretches between calibration windows are left out (**choice**)


def held_out_text(loaded: LoadedModel, calibration: Calibration) -> str:
    """Stretches of the calibration texts that no calibration window touches, evenly from each text, in their order.

    As many tokens as 16 windows of perplexity take, from as many stretches as that needs; a new line between them. It
    is text of the calibration's own domain, and was seen by no calibration.

    Raises InputError like `texts_of`, and where less than one such window is left.
    """
    window = fitting_window(loaded.model, _WINDOW)
    texts = texts_of(loaded, calibration)
    share = -(-_WINDOWS * window // len(texts))
    pieces: list[str] = []
    total = 0
    for text, count in zip(texts, windows_each(texts, calibration), strict=True):
        tokens = tokenize(loaded.tokenizer, text, loaded.model)
        starts = window_starts(tokens, windows=count, window=calibration.window, seed=calibration.seed, name=text.name)
        for stretch in _chosen(_untouched(len(tokens), starts, calibration.window), share, window):
            pieces.append(str(loaded.tokenizer.decode(tokens[stretch.start : stretch.stop], skip_special_tokens=False)))
            total += len(stretch)
    if total < window + _PIECE:  # decoded and read again, it may have a few tokens less
        raise InputError(
            f"The calibration text {calibration.text} leaves {total} tokens that no calibration window touches, and "
            f"{window + _PIECE} are needed to measure on; name a text to measure on with text=, or take fewer windows."
        )
    return "\n".join(pieces)


def _untouched(length: int, starts: list[int], window: int) -> list[range]:
    """Stretches of at least `_PIECE` positions that no window covers."""
    covered = torch.zeros(length + 2, dtype=torch.int32)
    for start in starts:
        covered[start + 1 : start + 1 + window] = 1
    covered[0] = covered[-1] = 1
    edges = torch.diff(covered)
    begins, ends = (edges == -1).nonzero().flatten().tolist(), (edges == 1).nonzero().flatten().tolist()
    return [range(begin, end) for begin, end in zip(begins, ends, strict=True) if end - begin >= _PIECE]


def _chosen(stretches: list[range], wanted: int, window: int) -> list[range]:
    """`wanted` positions of them, at most two windows of each, spread evenly over the text."""
    cut = [stretch[: 2 * window] for stretch in stretches]
    total = sum(map(len, cut))
    every = max(1, total // wanted)
    found: list[range] = []
    for stretch in cut[::every] + [one for index, one in enumerate(cut) if index % every]:
        if wanted <= 0:
            break
        found.append(stretch[:wanted])
        wanted -= len(found[-1])
    return sorted(found, key=lambda stretch: stretch.start)
