"""Which tokens calibrate, and how many of their windows run backward."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unirank.errors import InputError
from unirank.text.windows import BUILTIN, Text, bos_of, calibration_windows, check_window, tokenize
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from unirank.analysis.scheme.base import Scheme
    from unirank.analysis.store import AnalysisStore

CLIP = 0.0  # where nothing is said about clipping, and no store is gone on with
GRADIENT_WINDOWS = 32  # where a scheme needs gradients and the user says nothing (**choice**)


@dataclass(frozen=True)
class Calibration:
    """Which tokens calibrate.

    Attributes:
        text: "builtin" (Python's documentation), a path to UTF-8 text, or records (see `unirank.text.records`):
            "wikitext2", "c4", "ptb", JSON lines, parquet, a dataset's directory or hub name.
        windows: number of windows, at random positions.
        window: tokens a window.
        seed: of the positions.
        batch: windows that run together; more need more memory and round differently.
        gradient_windows: how many of the windows also run backward; None is 0, or 32 for a scheme that needs gradients.
        clip: tokens of a linear's input that are longer than this many times the median count with that length in its
            moments (see `unirank.layerwise.clipping`); 0 is off, else at least 1. None is that of the store that is
            gone on with, or whose gradients are taken, and else the default, CLIP.
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
    clip: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str | os.PathLike):
            raise InputError(f"Calibration.text = {self.text!r} is not legal; it is a path or a name.")
        object.__setattr__(self, "text", os.fspath(self.text))
        if self.clip is not None:
            object.__setattr__(self, "clip", _checked_clip(self.clip))


def _checked_clip(clip: float) -> float:
    if not isinstance(clip, int | float) or isinstance(clip, bool) or not (clip == 0 or 1 <= clip < math.inf):
        raise InputError(f"Calibration.clip = {clip!r} is not legal; it is 0, for off, or a number of at least 1.")
    return float(clip)


def with_clip(calibration: Calibration, *stores: AnalysisStore | None) -> Calibration:
    """`calibration` with a clip: the one that was said, else that of the first of `stores` there is, else CLIP."""
    if calibration.clip is not None:
        return calibration
    clips = (store.identity.calibration.clip or 0.0 for store in stores if store is not None)
    return dataclasses.replace(calibration, clip=next(clips, CLIP))


def calibration_of(given: Calibration | str | Path | None) -> Calibration:
    """What was given for a calibration: as it is, or its text alone. None is the default.

    Raises InputError for anything else.
    """
    if isinstance(given, str | os.PathLike):
        return Calibration(os.fspath(given))
    if given is not None and not isinstance(given, Calibration):
        raise InputError(
            f"calibration = {given!r} is not legal; it is a unirank.Calibration, or a text's path or name."
        )
    return given or Calibration()


def gradient_windows(calibration: Calibration, scheme: Scheme) -> int:
    """How many windows run backward. Raises InputError for numbers that are not legal or too small for `scheme`."""
    if calibration.batch < 1:
        raise InputError(f"batch = {calibration.batch} is not legal; at least 1 window is needed.")
    asked = calibration.gradient_windows
    count = min(GRADIENT_WINDOWS, calibration.windows) if asked is None and scheme.needs_gradient else asked or 0
    if not 0 <= count <= calibration.windows:
        raise InputError(
            f"Calibration.gradient_windows = {count} is not legal; "
            f"it is at least 0 and at most windows = {calibration.windows}."
        )
    if scheme.needs_gradient and count == 0:
        raise InputError(f"The scheme {scheme.name} needs gradients; Calibration.gradient_windows must be at least 1.")
    return count


def windows_of(loaded: LoadedModel, text: Text, calibration: Calibration) -> torch.Tensor:
    """The calibration windows, int64 `[W, T]`. Raises InputError like `calibration_windows` and `check_window`."""
    check_window(loaded.model, calibration.window, "Calibration.window")
    tokens = tokenize(loaded.tokenizer, text, loaded.model)
    bos = bos_of(loaded.tokenizer)
    return calibration_windows(
        tokens, windows=calibration.windows, window=calibration.window, seed=calibration.seed, bos=bos, name=text.name
    )
