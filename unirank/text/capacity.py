"""How many windows a text can give; who asks for more is told so before any work, for random positions just repeat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unirank.errors import InputError


@dataclass(frozen=True)
class Supply:
    """What a text has for windows at random positions.

    Attributes:
        name: of the text.
        tokens: of the whole text.
        window: tokens a window takes from it; a BOS is not of the text.
        asked: windows that are asked for.
        positions: at which a window may begin.
    """

    name: str
    tokens: int
    window: int
    asked: int
    positions: int

    @property
    def apart(self) -> int:
        """Windows that fit in side by side, without a token in two of them; at least 1."""
        return max(1, self.tokens // self.window)

    @property
    def distinct(self) -> int:
        """The most tokens of the text that the windows can hold."""
        return min(self.asked * self.window, self.tokens)

    @property
    def _has(self) -> str:
        return f"The text {self.name} has {self.tokens:,} tokens"

    def check(self) -> None:
        """Raise InputError where a window would have to be given twice."""
        if self.asked > self.positions:
            raise InputError(
                f"{self._has}, which give at most {_counted(self.positions, 'different ')} of {self.window}; "
                f"Calibration.windows = {self.asked} is not legal there. Give a longer text, or at most "
                f"{_counted(self.apart)}, which is what fits in side by side."
            )

    @property
    def note(self) -> str | None:
        """A warning where windows must overlap, with the number that do not; else None."""
        if self.asked <= self.apart:
            return None
        return (
            f"{self._has}, which is {_counted(self.apart)} of {self.window} side by side; {self.asked:,} windows "
            f"overlap, and read the text about {self.asked * self.window / self.tokens:.3g} times: more work, and "
            f"little more to learn from. Give a longer text, or Calibration.windows = {self.apart}."
        )


def _counted(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}window{'' if count == 1 else 's'}"


def supply_of(tokens: torch.Tensor, *, windows: int, window: int, bos: int | None, name: str) -> Supply:
    """What `tokens`, int64 `[T]` and longer than a window, have for `windows` windows (see `calibration_windows`)."""
    return Supply(name, len(tokens), window - (bos is not None), windows, len(tokens) - window)
