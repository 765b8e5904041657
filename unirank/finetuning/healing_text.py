"""The windows of healing: to train on, held out of the same texts, and of a second text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unirank.analysis.calibration import Calibration, texts_of, windows_each
from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError, warn
from unirank.text.capacity import supply_of
from unirank.text.mixture import SEPARATOR, interleaved
from unirank.text.windows import Text, bos_of, calibration_windows, check_window, read_text, tokenize
from unirank.types import LoadedModel


@dataclass(frozen=True)
class Drawn:
    """Windows int64 `[W, T]`.

    Attributes:
        train: what layers are trained on.
        whole: what the whole model is distilled on, as many windows as its steps take; None where it is not.
        looks: what tells which state of a layer is best: held-out windows, and those of the second text.
        texts: of `train`.
        second: of which nothing is in `train`.
    """

    train: torch.Tensor
    whole: torch.Tensor | None
    looks: tuple[torch.Tensor, ...]
    texts: Sequence[Text]
    second: Text | None

    def as_dict(self) -> dict[str, Any]:
        """What the data were, for JSON."""
        named = [("train", self.train), *((f"look {i}", windows) for i, windows in enumerate(self.looks))]
        named += [("whole", self.whole)] if self.whole is not None else []
        second = None if self.second is None else {"text": self.second.name, "text_sha256": self.second.sha256}
        return {
            "text": SEPARATOR.join(text.name for text in self.texts),
            "text_sha256": SEPARATOR.join(text.sha256 for text in self.texts),
            "second": second,
            "window": self.train.shape[1],
            "train_windows": len(self.train),
            "whole_windows": 0 if self.whole is None else len(self.whole),
            "held_out_windows": len(self.looks[0]),
            "windows_sha256": sha256_tensors(named),
        }


def draw(
    loaded: LoadedModel, calibration: Calibration, second_text: str | None, held_out: float, whole: int = 0
) -> Drawn:
    """Draw `calibration.windows` windows, of which `held_out` (a fraction; of each text at least one) are not trained
    on; and `whole` more, in the same shares, for the whole model, as far as a text has different ones.

    The held-out windows come from the end of a text, that fraction of its tokens and at least a window: random
    positions in one text would overlap. As many windows of the second text join them; none of it is trained on.

    Warns where what is trained on is too short for so many windows. Raises InputError like `texts_of`, `windows_each`,
    `check_window` and `calibration_windows`; for a text that gives less than 2 windows, or has to give one twice.
    """
    check_window(loaded.model, calibration.window, "Calibration.window")
    texts = texts_of(loaded, calibration)
    second = None if second_text is None else read_text(second_text, loaded.tokenizer)
    bos = bos_of(loaded.tokenizer, loaded.model)
    train, held, more = [], [], []
    counts = windows_each(texts, calibration)
    wholes = windows_each(texts, dataclasses.replace(calibration, windows=whole)) if whole else [0] * len(texts)
    for text, count, many in zip(texts, counts, wholes, strict=True):
        if count < 2:
            raise InputError(
                f"Calibration.windows = {calibration.windows} is not legal here: the text {text.name} gives {count}, "
                "and at least 2 are needed, one of them held out."
            )
        tokens = tokenize(loaded.tokenizer, text, loaded.model)
        end = max(round(held_out * len(tokens)), calibration.window + 1)
        if len(tokens) - end <= calibration.window:
            raise InputError(
                f"The text {text.name} is too short: it has {len(tokens)} tokens, and {2 * calibration.window + 2} are "
                f"needed for windows of {calibration.window} to train on and others that are held out."
            )
        away = min(count - 1, max(1, round(held_out * count)))
        window = calibration.window
        supply = supply_of(tokens[:-end], windows=count - away, window=window, bos=bos, name=text.name)
        supply.check()
        if supply.note:
            warn(supply.note)
        train.append(_windows(loaded, tokens[:-end], calibration, count - away, text))
        if many:
            more.append(_windows(loaded, tokens[:-end], calibration, min(many, supply.positions), text))
        held.append(_windows(loaded, tokens[-end:], calibration, away, text))
    looks = [interleaved(held)]
    if second is not None:
        tokens = tokenize(loaded.tokenizer, second, loaded.model)
        looks.append(_windows(loaded, tokens, calibration, len(looks[0]), second))
    return Drawn(interleaved(train), interleaved(more) if more else None, tuple(looks), texts, second)


def _windows(
    loaded: LoadedModel, tokens: torch.Tensor, calibration: Calibration, count: int, text: Text
) -> torch.Tensor:
    bos, window = bos_of(loaded.tokenizer, loaded.model), calibration.window
    return calibration_windows(tokens, windows=count, window=window, seed=calibration.seed, bos=bos, name=text.name)
