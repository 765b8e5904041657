"""Recipes by name: a scheme, an allocator and a second pass that go well together (docs/experiments.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from unirank.analysis.scheme import scheme as scheme_of
from unirank.errors import InputError
from unirank.planning.allocator import allocator as allocator_of
from unirank.rank_plan import check_form
from unirank.types import Form

if TYPE_CHECKING:
    from unirank.compression.refine import Refine
    from unirank.finetuning.settings import Heal
    from unirank.planning.score import ScoreSettings


@dataclass(frozen=True)
class Preset:
    """A recipe.

    Attributes:
        scheme, allocator: names.
        settings: of allocators that score; None is UniRank's.
        options: the allocator's own.
        refine: the second pass, or None.
        form: in which low-rank matrices are stored.
        multiple_of: what ranks are multiples of where nothing else is asked for and the budget has room for it (see
            `unirank.planning.ranks.fitting_multiple`).
        heal: refinement by gradient afterwards, or None.
    """

    scheme: str = "whiten"
    allocator: str = "unirank"
    settings: ScoreSettings | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    refine: Refine | None = None
    form: Form = "factors"
    multiple_of: int = 1
    heal: Heal | None = None

    @property
    def needs_gradients(self) -> bool:
        """Whether the analysis must run backward."""
        return bool(self.needs_gradients_for)

    @property
    def needs_gradients_for(self) -> str:
        """What needs gradients, in words; empty where nothing does."""
        if scheme_of(self.scheme).needs_gradient:
            return f"the scheme {self.scheme}"
        if allocator_of(self.allocator).gradients:
            return f"the allocator {self.allocator}"
        return "the second pass" if self.refine is not None and self.refine.metric else ""

    @property
    def measures(self) -> bool:
        """Whether the allocator runs the dense model."""
        return allocator_of(self.allocator).measures

    @property
    def needs_tokens(self) -> bool:
        """Whether calibration tokens are needed again after the analysis."""
        return bool(self.needs_tokens_for)

    @property
    def needs_tokens_for(self) -> str:
        """What needs them, in words."""
        return " and ".join([f"the allocator {self.allocator}"] * self.measures + self.afterwards)

    @property
    def afterwards(self) -> list[str]:
        """What follows the ranks, and needs tokens, in words."""
        return ["the second pass"] * (self.refine is not None) + ["healing"] * (self.heal is not None)


# Of ranks, for tensor cores and groups of quantised weights (**choice**: at most 2 % on SmolLM2, docs/experiments.md).
_MULTIPLE = 16


def _unirank() -> Preset:
    return Preset()


def _fast() -> Preset:
    from unirank.compression.refine import Refine

    return Preset("afm", "lems", refine=Refine(centred=True), form="pivoted", multiple_of=_MULTIPLE)


def _best() -> Preset:
    from unirank.compression.refine import Refine

    return Preset("kfac", "lems", refine=Refine(centred=True, metric=True), form="pivoted", multiple_of=_MULTIPLE)


def _healed() -> Preset:
    from unirank.finetuning.settings import Heal

    return replace(_best(), heal=Heal())


def _distilled() -> Preset:
    from unirank.finetuning.settings import Heal

    return replace(_best(), heal=Heal(distill_steps=200))


# Made when they are asked for, so that names cost nothing.
_PRESETS = {"unirank": _unirank, "fast": _fast, "best": _best, "healed": _healed, "distilled": _distilled}


def presets() -> tuple[str, ...]:
    """Names of all presets, cheapest first: `unirank` is the paper, `fast` the best without gradients, `best` the best
    without training, `healed` refines `best` layer by layer, `distilled` then trains the whole model a little.
    """
    return tuple(_PRESETS)


def preset(name: str) -> Preset:
    """The preset of that name; raises InputError with the legal names."""
    if name not in _PRESETS:
        raise InputError(f"The preset {name!r} does not exist; legal values: {', '.join(_PRESETS)}.")
    return _PRESETS[name]()


def name_of(found: Preset) -> str:
    """The name of the preset that `found` is, whatever form it is stored in; else its scheme and allocator."""
    for name in _PRESETS:
        if replace(found, form=_PRESETS[name]().form) == _PRESETS[name]():
            return name
    return f"{found.scheme}+{found.allocator}"


def recipe(
    name: str | None = None,
    *,
    scheme: str | None = None,
    allocator: str | None = None,
    settings: ScoreSettings | None = None,
    options: Mapping[str, float] | None = None,
    refine: Refine | None = None,
    heal: Heal | None = None,
    form: Form | None = None,
) -> Preset:
    """The preset `name`, or the parts that are given; the parts that are not are those of `unirank`, the paper.

    `form` may be given beside a preset too: it says how what the recipe finds is stored, and counted.

    Raises InputError for names that do not exist, and for parts beside a preset, which sets them all.
    """
    parts = {"scheme": scheme, "allocator": allocator, "settings": settings, "options": options}
    parts |= {"refine": refine, "heal": heal}
    given = {part: value for part, value in parts.items() if value is not None}
    if form is not None:
        check_form(form)
    if name is not None:
        if given:
            other = next(iter(given))
            raise InputError(f"preset = {name!r} sets {', '.join(parts)}; {other}= is given too: leave one out.")
        found = preset(name)
    else:
        found = Preset(**given)
        scheme_of(found.scheme)
        allocator_of(found.allocator)
    return found if form is None else replace(found, form=form)
