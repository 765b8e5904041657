"""Which tokens calibrate, and how many of their windows run backward."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unirank.errors import InputError
from unirank.text.capacity import Supply, supply_of
from unirank.text.mixture import SEPARATOR, interleaved, shared_out, sources_of
from unirank.text.windows import BUILTIN, Text, bos_of, calibration_windows, check_window, read_text, tokenize
from unirank.types import LoadedModel

if TYPE_CHECKING:
    from unirank.analysis.scheme.base import Scheme
    from unirank.analysis.store import AnalysisStore

CLIP = 2.0  # where nothing is said about clipping, and no store is gone on with (**choice**, docs/experiments.md)
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
GRADIENT_WINDOWS = 32  # where a scheme needs gradients and the user says nothing (**choice**)


@dataclass(frozen=True)
class Calibration:
    """Which tokens calibrate.

    Attributes:
        text: "builtin" (Python's documentation), a path to UTF-8 text, or records (see `unirank.text.records`):
            "wikitext2", "c4", "ptb", JSON lines, parquet, a dataset's directory or hub name. Or several of these, with
            commas between them or as a sequence, which is kept joined by commas. A path that exists is one text,
            whatever commas its name has.
        windows: number of windows, at random positions; of all texts together.
        window: tokens a window.
        seed: of the positions.
        batch: windows that run together; more need more memory and round differently.
        gradient_windows: how many of the windows also run backward; None is 0, or 32 for a scheme that needs gradients.
        clip: tokens of a linear's input that are longer than this many times the median count with that length in its
            moments (see `unirank.layerwise.clipping`); 0 is off, else at least 1. None is that of the store that is
            gone on with, or whose gradients are taken, and else the default, CLIP.
        shrink: share in [0, 1] by which what two channels of an input do together counts less in its moments (see
            `unirank.layerwise.shrinkage`); 0 is off. None is that of the store that is gone on with, and else
            the scheme's, `Scheme.shrink`.
        shares: of several texts, how many of the windows each gives, as positive numbers in any unit; None is equal
            shares. See `unirank.text.mixture` for rounding and order.
        precision: of the decomposition: "float64", or "float32" for GPUs whose float64 is slow; its errors are in
            docs/numerics.md. Moments are summed in float64 either way.
        split, revision: of a dataset (of every text, where there are several); None is "train", and the newest.
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
    shrink: float | None = None
    shares: Sequence[float] | None = None
    precision: str = "float64"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(
                f"Calibration.precision = {self.precision!r} is not legal; it is {' or '.join(PRECISIONS)}."
            )
        object.__setattr__(self, "text", _joined(self.text))
        if self.shares is not None:
            object.__setattr__(self, "shares", _checked_shares(self.shares))
        if self.clip is not None:
            object.__setattr__(self, "clip", _checked_clip(self.clip))
        if self.shrink is not None:
            object.__setattr__(self, "shrink", _checked_shrink(self.shrink))


def _joined(given: object) -> str:
    """Names of texts as one string."""
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    if not isinstance(given, Sequence) or not given or not all(isinstance(one, str | os.PathLike) for one in given):
        raise InputError(f"Calibration.text = {given!r} is not legal; it is a path or a name, or several of them.")
    names = [os.fspath(one) for one in given]
    for name in names:
        if len(names) > 1 and SEPARATOR in name:
            raise InputError(f"Calibration.text has {name!r}; among several texts none has a comma in its name.")
    return SEPARATOR.join(names)


def _checked_shares(given: object) -> tuple[float, ...]:
    numbers = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
    if not numbers or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise InputError(f"Calibration.shares = {given!r} is not legal; it is a number for each text.")
    if not all(0 < number < math.inf for number in numbers):
        raise InputError(f"Calibration.shares = {given!r} is not legal; every share is a number above 0.")
    return numbers


def _checked_clip(clip: float) -> float:
    if not isinstance(clip, int | float) or isinstance(clip, bool) or not (clip == 0 or 1 <= clip < math.inf):
        raise InputError(f"Calibration.clip = {clip!r} is not legal; it is 0, for off, or a number of at least 1.")
    return float(clip)


def _checked_shrink(shrink: float) -> float:
    if not isinstance(shrink, int | float) or isinstance(shrink, bool) or not 0 <= shrink <= 1:
        raise InputError(f"Calibration.shrink = {shrink!r} is not legal; it is a number from 0, for off, to 1.")
    return float(shrink)


def settled(
    calibration: Calibration, scheme: Scheme, begun: AnalysisStore | None = None, source: AnalysisStore | None = None
) -> Calibration:
    """`calibration` with a clip and a share to shrink by, where they are not said.

    Both are those of the store that is gone on with; else the clip is that of the store whose gradients are taken, or
    CLIP, and the share the scheme's, for the other store may be of another scheme.
    """
    clip, shrink = calibration.clip, calibration.shrink
    if clip is None:
        known = begun or source
        clip = CLIP if known is None else known.identity.calibration.clip or 0.0
    if shrink is None:
        shrink = scheme.shrink if begun is None else begun.identity.calibration.shrink or 0.0
    return dataclasses.replace(calibration, clip=clip, shrink=shrink)


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


def texts_of(loaded: LoadedModel, calibration: Calibration) -> tuple[Text, ...]:
    """The texts of `calibration`, read.

    Raises InputError like `read_text`; for shares that are not one a text; and for two texts of one content, whose
    windows would be the same ones.
    """
    sources = sources_of(calibration.text)
    shares = calibration.shares
    if shares is not None and len(shares) != len(sources):
        raise InputError(
            f"Calibration.shares = {tuple(shares)} is not legal; there must be one for each text, and "
            f"{calibration.text!r} is {len(sources)}."
        )
    split, revision = calibration.split, calibration.revision
    texts = tuple(read_text(source, loaded.tokenizer, split=split, revision=revision) for source in sources)
    first: dict[str, str] = {}
    for source, text in zip(sources, texts, strict=True):
        if (other := first.setdefault(text.sha256, source)) != source:
            raise InputError(f"The texts {other} and {source} have the same content; give it once.")
    return texts


def windows_each(texts: Sequence[Text], calibration: Calibration) -> list[int]:
    """How many of the windows are of each text. Raises InputError like `shared_out`."""
    shares = calibration.shares or [1] * len(texts)
    if len(texts) == 1:
        return [calibration.windows]  # a number of windows that is not legal is `calibration_windows`' matter
    return shared_out(calibration.windows, shares, [text.name for text in texts])


def windows_of(loaded: LoadedModel, texts: Sequence[Text], calibration: Calibration) -> torch.Tensor:
    """The calibration windows, int64 `[W, T]`, each text's drawn as if it were alone and then interleaved.

    Raises InputError like `calibration_windows`, `check_window` and `shared_out`.
    """
    return _drawn(loaded, texts, calibration)[0]


def checked_windows(
    loaded: LoadedModel, texts: Sequence[Text], calibration: Calibration, *, moments: bool = True
) -> tuple[torch.Tensor, list[str]]:
    """`windows_of`, for an analysis that is about to be made of them, and warnings for whoever makes it.

    They tell of a text that is too short for so many windows and, with `moments`, of fewer tokens than the widest
    linear has inputs. Raises InputError too where a text would have to give a window twice.
    """
    windows, supplies = _drawn(loaded, texts, calibration)
    for supply in supplies:
        supply.check()
    notes = [supply.note for supply in supplies if supply.note]
    widest = max(loaded.linears, key=lambda spec: spec.n)
    tokens = sum(supply.distinct for supply in supplies)
    if moments and tokens < widest.n:
        needed = -(-widest.n // calibration.window)
        longer = f" and a text of {widest.n:,} tokens" if sum(supply.tokens for supply in supplies) < widest.n else ""
        notes.append(
            f"Only {tokens:,} tokens calibrate, and the widest linear ({widest.name}) has {widest.n:,} inputs: what no "
            f"token shows counts for nothing and is cut away. Needed are at least {needed:,} windows of "
            f"{calibration.window} (Calibration.windows){longer}; several times as many are better."
        )
    return windows, notes


def _drawn(loaded: LoadedModel, texts: Sequence[Text], calibration: Calibration) -> tuple[torch.Tensor, list[Supply]]:
    """The windows, and what each text has for them."""
    check_window(loaded.model, calibration.window, "Calibration.window")
    bos = bos_of(loaded.tokenizer, loaded.model)
    parts, supplies = [], []
    for text, count in zip(texts, windows_each(texts, calibration), strict=True):
        tokens = tokenize(loaded.tokenizer, text, loaded.model)
        options = {"window": calibration.window, "seed": calibration.seed, "bos": bos, "name": text.name}
        parts.append(calibration_windows(tokens, windows=count, **options))
        supplies.append(supply_of(tokens, windows=count, window=calibration.window, bos=bos, name=text.name))
    return interleaved(parts), supplies
