"""Recipes by name: a scheme, an allocator and a second pass that go well together (docs/experiments.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from unirank.analysis.scheme import scheme as scheme_of
from unirank.compression.refine import Refine
from unirank.errors import InputError
from unirank.planning.allocator import allocator as allocator_of
from unirank.planning.score import ScoreSettings


@dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes:
        scheme, allocator: names.
        settings: of allocators that score; None is UniRank's.
        options: the allocator's own.
        refine: the second pass, or None.
    """

    scheme: str
    allocator: str
    settings: ScoreSettings | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    refine: Refine | None = None

    @property
    def needs_gradients(self) -> bool:
        """Whether the analysis must run backward."""
        return (
            scheme_of(self.scheme).needs_gradient
            or allocator_of(self.allocator).gradients
            or (self.refine is not None and self.refine.metric)
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether calibration tokens are needed again after the analysis."""
        return bool(self.needs_tokens_for)

    @property
    def needs_tokens_for(self) -> str:
        """What needs them, in words."""
        parts = [f"the allocator {self.allocator}"] if allocator_of(self.allocator).measures else []
        return " and ".join([*parts, "the second pass"] if self.refine is not None else parts)


_PRESETS: dict[str, Preset] = {
    "unirank": Preset("whiten", "unirank"),
    "fast": Preset("afm", "lems", refine=Refine(centred=True)),
    "best": Preset("kfac", "lems", refine=Refine(centred=True, metric=True)),
}


def presets() -> tuple[str, ...]:
    """Names of all presets: `unirank` is the paper, `fast` the best without gradients, `best` the best."""
    return tuple(_PRESETS)


def preset(name: str) -> Preset:
    """The preset of that name; raises InputError with the legal names."""
    if name not in _PRESETS:
        raise InputError(f"The preset {name!r} does not exist; legal values: {', '.join(_PRESETS)}.")
    return _PRESETS[name]
