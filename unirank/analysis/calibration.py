"""Which tokens calibrate, and how many of their windows run backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unirank.analysis.scheme.base import Scheme
from unirank.errors import InputError
from unirank.text.windows import BUILTIN, Text, bos_of, calibration_windows, check_window, tokenize
from unirank.types import LoadedModel

GRADIENT_WINDOWS = 32  # where a scheme needs gradients and the user says nothing (**choice**)


@dataclass(frozen=True)
class Calibration:
    """Which tokens calibrate.

    Attributes:
        text: "builtin" (Python's documentation), a path to UTF-8 text, or records (see `unirank.sources`): "wikitext2",
            "c4", "ptb", JSON lines, parquet, a dataset's directory or hub name.
        windows: number of windows, at random positions.
        window: tokens a window.
        seed: of the positions.
        batch: windows that run together; more need more memory and round differently.
        gradient_windows: how many of the windows also run backward; None is 0, or 32 for a scheme that needs gradients.
        split, revision: of a dataset; None is "train", and the newest.
    """

    text: str = BUILTIN
    windows: int = 64
    window: int = 512
    seed: int = 0
    batch: int = 8
    gradient_windows: int | None = None
    split: str | None = None
    revision: str | None = None


def gradient_windows(calibration: Calibration, scheme: Scheme) -> int:
    """How many windows run backward. Raises InputError for numbers that are not legal or too small for `scheme`."""
    if calibration.batch < 1:
        raise InputError(f"batch = {calibration.batch} is not legal; at least 1 window is needed.")
    asked = calibration.gradient_windows
    count = min(GRADIENT_WINDOWS, calibration.windows) if asked is None and scheme.needs_gradient else asked or 0
    if not 0 <= count <= calibration.windows:
        raise InputError(
            f"gradient_windows = {count} (--gradients) is not legal; "
            f"it is at least 0 and at most windows = {calibration.windows}."
        )
    if scheme.needs_gradient and count == 0:
        raise InputError(
            f"The scheme {scheme.name} needs gradients; gradient_windows (--gradients) must be at least 1."
        )
    return count


def windows_of(loaded: LoadedModel, text: Text, calibration: Calibration) -> torch.Tensor:
    """The calibration windows, int64 `[W, T]`. Raises InputError like `calibration_windows` and `check_window`."""
    check_window(loaded.model, calibration.window, "Calibration.window")
    tokens = tokenize(loaded.tokenizer, text, loaded.model)
    bos = bos_of(loaded.tokenizer)
    return calibration_windows(
        tokens, windows=calibration.windows, window=calibration.window, seed=calibration.seed, bos=bos, name=text.name
    )
