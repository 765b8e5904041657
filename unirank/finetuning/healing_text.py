"""The windows of healing: to train on, held out of the same text, and of a second text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unirank.analysis.calibration import Calibration
from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError
from unirank.text.windows import Text, bos_of, calibration_windows, check_window, read_text, tokenize
from unirank.types import LoadedModel


@dataclass(frozen=True)
class Drawn:
    """Windows int64 `[W, T]`.

    Attributes:
        train: what layers are trained on.
        looks: what tells which state of a layer is best: held-out windows, and those of the second text.
    """

    train: torch.Tensor
    looks: tuple[torch.Tensor, ...]
    text: Text
    second: Text | None

    def as_dict(self) -> dict[str, Any]:
        """What the data were, for JSON."""
        named = [("train", self.train), *((f"look {i}", windows) for i, windows in enumerate(self.looks))]
        second = None if self.second is None else {"text": self.second.name, "text_sha256": self.second.sha256}
        return {
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "second": second,
            "window": self.train.shape[1],
            "train_windows": len(self.train),
            "held_out_windows": len(self.looks[0]),
            "windows_sha256": sha256_tensors(named),
        }


def draw(loaded: LoadedModel, calibration: Calibration, second_text: str | None, held_out: float) -> Drawn:
    """Draw `calibration.windows` windows, of which `held_out` (a fraction, at least one) are not trained on.

    The held-out windows come from the end of the text, that fraction of its tokens and at least a window: random
    positions in one text would overlap. As many windows of the second text join them; none of it is trained on.

    Raises InputError like `read_text`, `check_window` and `calibration_windows`; for less than 2 windows.
    """
    check_window(loaded.model, calibration.window, "Calibration.window")
    if calibration.batch < 1:
        raise InputError(f"Calibration.batch = {calibration.batch} is not legal; at least 1 window is needed.")
    if calibration.windows < 2:
        raise InputError(
            f"Calibration.windows = {calibration.windows} is not legal here; at least 2 are needed, one of them held "
            "out."
        )
    text = read_text(calibration.text, loaded.tokenizer, split=calibration.split, revision=calibration.revision)
    second = None if second_text is None else read_text(second_text, loaded.tokenizer)
    tokens = tokenize(loaded.tokenizer, text, loaded.model)
    end = max(round(held_out * len(tokens)), calibration.window + 1)
    if len(tokens) - end <= calibration.window:
        raise InputError(
            f"The text {text.name} is too short: it has {len(tokens)} tokens, and {2 * calibration.window + 2} are "
            f"needed for windows of {calibration.window} to train on and others that are held out."
        )
    count = min(calibration.windows - 1, max(1, round(held_out * calibration.windows)))
    bos = bos_of(loaded.tokenizer)

    def windows(tokens: torch.Tensor, number: int, name: str) -> torch.Tensor:
        return calibration_windows(
            tokens, windows=number, window=calibration.window, seed=calibration.seed, bos=bos, name=name
        )

    train = windows(tokens[:-end], calibration.windows - count, text.name)
    looks = [windows(tokens[-end:], count, text.name)]
    if second is not None:
        looks.append(windows(tokenize(loaded.tokenizer, second, loaded.model), count, second.name))
    return Drawn(train, tuple(looks), text, second)
