"""What a compressed model must reach, in the user's units, instead of a removed fraction."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unirank.errors import InputError
from unirank.models.bits import check_bits


@dataclass(frozen=True, kw_only=True)
class Target:
    """Exactly one of the first three; the largest removal (for the perplexity) or the least one (for the others) that
    reaches it is taken.

    Attributes:
        max_perplexity_increase: over the dense model's perplexity, as a fraction: 0.1 allows 10 % more. Above 0.
        params: the most parameters of the whole model, tied ones once.
        size: the most bytes of the whole model's weights on disk, in the dtype of the model, or with `bits`.
        bits: with `size`: the result will be quantised to so many bits afterwards (`unirank.quantize`), 8 or 4.
        text: what perplexity is measured on, see `unirank.evaluate`; for `unirank.auto`, and for `compress` with
            `max_perplexity_increase`. None is the held-out part of the calibration text: of the builtin one
            "builtin-held-out", of any other what lies between its calibration windows.
        window: tokens a window of it; None is that of `unirank.evaluate`.
        limit: the first so many windows of it; None is all.
        evaluations: with `max_perplexity_increase`: the most removed fractions to measure (**choice**: 6, which leaves
            half a percent between what holds and what does not).

    Raises InputError for values that are not legal.
    """

    max_perplexity_increase: float | None = None
    params: int | None = None
    size: int | None = None
    bits: int | None = None
    text: str | None = None
    window: int | None = None
    limit: int | None = None
    evaluations: int = 6

    def __post_init__(self) -> None:
        given = [name for name in ("max_perplexity_increase", "params", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(f"{name}=" for name in given) if given else "none"
            raise InputError(
                f"A target is exactly one of max_perplexity_increase=, params= and size=; {got} was given."
            )
        self._check_increase()
        for name in ("params", "size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} = {value!r} is not legal; it must be a whole number, at least 1.")
        if self.bits is not None:
            if self.size is None:
                raise InputError("bits= says how the size is counted, so it needs size=.")
            check_bits(self.bits, None)

    def _check_increase(self) -> None:
        increase = self.max_perplexity_increase
        if increase is None:
            return
        if isinstance(increase, bool) or not isinstance(increase, int | float) or not 0 < increase < math.inf:
            raise InputError(
                f"max_perplexity_increase = {increase!r} is not legal; it is a fraction above 0 (0.1 allows 10 % more)."
            )
        if isinstance(self.evaluations, bool) or not isinstance(self.evaluations, int) or self.evaluations < 1:
            raise InputError(f"evaluations = {self.evaluations!r} is not legal; it must be at least 1.")
