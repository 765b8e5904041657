"""What an allocator is: a function from an analysis and a budget to ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unirank import looks, ops
from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError
from unirank.planning.score import Components, ScoreSettings, marginal_cost
from unirank.progress import OnProgress, silent
from unirank.types import CosineStat, ExpertSpec, Form, LinearSpec, ListedSpec, LoadedModel


@dataclass(frozen=True)
class Workbench:
    """What rules that measure need: the dense model, and windows of calibration text, int64 `[W, T]`."""

    loaded: LoadedModel
    windows: torch.Tensor
    progress: OnProgress = silent

    def __repr__(self) -> str:
        count, length = self.windows.shape
        return looks.lines(f"Workbench: {count} windows of {length} tokens for {self.loaded.source}")


@dataclass(frozen=True)
class Request:
    """What an allocator is asked: linears, their spectra and cosines, and the budget in parameters.

    Attributes:
        store: for what else a rule reads (curvatures, slopes, factors).
        options: the rule's own options, complete and checked against `Allocator.options`.
        workbench: for rules that measure the model; None otherwise.
        form: in which low-rank matrices are stored, and so what a rank costs.
    """

    linears: tuple[LinearSpec, ...]
    energies: Mapping[str, torch.Tensor]
    cosines: Sequence[Mapping[str, CosineStat]]
    settings: ScoreSettings
    remove: float
    budget: int
    min_rank: int
    multiple_of: int
    store: AnalysisStore
    options: Mapping[str, float]
    workbench: Workbench | None = None
    form: Form = "factors"

    @property
    def shares(self) -> dict[str, float]:
        """`AnalysisStore.shares`; empty without experts."""
        return self.store.shares() if any(isinstance(spec, ExpertSpec | ListedSpec) for spec in self.linears) else {}

    def check_floor(self) -> None:
        """Raise InputError when `min_rank` alone exceeds the budget."""
        check_floor(self.linears, self.remove, self.budget, self.min_rank, self.multiple_of, self.form)

    def prices(self, spec: LinearSpec) -> torch.Tensor:
        """Parameters that ranks 1 ... K of a matrix cost, int64 `[K]`; `M N` where it is dense."""
        ranks = torch.arange(1, spec.k + 1)
        return (ranks * spec.cost - (ranks * ranks if self.form == "pivoted" else 0)).clamp_max(spec.params)

    def kept(self, vectors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One value a component, by linear, up to the rank at which the matrix is dense."""
        return {spec.name: vectors[spec.name][: spec.dense_rank(self.form)] for spec in self.linears}

    def marginal(self, spec: LinearSpec) -> torch.Tensor:
        """What each component costs beyond those before it, float64 `[K]`: `M + N`, pivoted `M + N - 2 i + 1`."""
        return marginal_cost(spec, self.form)


@dataclass(frozen=True)
class Allocator:
    """A rule: `allocate` returns ranks (K means dense) in the order of the linears, and the threshold or None.

    A third result, a mapping that JSON can hold, is what the rule learned on the way; it joins the plan's settings.

    Attributes:
        scored: the score settings matter to it.
        options: numbers that it takes by name, with their defaults.
        ranges: of options that are not legal everywhere, the least and the largest legal value.
        check: raises InputError where the rule cannot serve linears like these with these options; asked before the
            analysis. None serves all.
        measures: it runs the model, so `Request.workbench` is needed.
        gradients: it needs a store that was analyzed with gradients.
    """

    name: str
    scored: bool
    allocate: Callable[[Request], tuple[list[int], float | None] | tuple[list[int], float | None, Mapping[str, Any]]]
    options: Mapping[str, float] = field(default_factory=dict)
    measures: bool = False
    gradients: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    check: Callable[[Sequence[LinearSpec], Mapping[str, float]], None] | None = None


def take_best(components: Components, request: Request) -> tuple[list[int], float | None]:
    """Keep the best components up to the budget (method 2): `ops.global_topk`.

    Raises InputError when `min_rank` alone exceeds the budget.
    """
    request.check_floor()
    ranks, threshold = ops.global_topk(
        components.value,
        components.cost,
        components.dense_cost,
        components.offsets,
        request.budget,
        request.min_rank,
        request.multiple_of,
        request.form == "pivoted",
    )
    value = float(threshold)
    return ranks.tolist(), value if value != float("inf") else None


def check_floor(
    linears: Sequence[LinearSpec], remove: float, budget: int, min_rank: int, multiple_of: int, form: Form
) -> None:
    """Raise InputError when `min_rank` alone exceeds the budget."""
    least = -(-min_rank // multiple_of) * multiple_of
    floor = sum(spec.rank_cost(min(least, spec.k), form) for spec in linears)
    if floor > budget:
        raise InputError(
            f"remove = {remove} cannot be reached: min_rank = {min_rank} with multiple_of = {multiple_of} already "
            f"needs {floor} parameters and the budget is {budget}."
        )


def options_of(rule: Allocator, given: Mapping[str, float]) -> dict[str, float]:
    """The rule's options with `given` instead of the defaults.

    Raises InputError for an unknown name (with the legal ones) or a number outside of its range.
    """
    for name, value in given.items():
        if name not in rule.options:
            legal = f"it takes {', '.join(rule.options)}" if rule.options else "it takes none"
            raise InputError(f"The allocator {rule.name} has no option {name!r}; {legal}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"The option {name} = {value!r} of {rule.name} is not legal; it must be a finite number.")
        low, high = rule.ranges.get(name, (-math.inf, math.inf))
        if not low <= value <= high:
            legal = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            raise InputError(f"The option {name} = {value!r} of {rule.name} is not legal; it must be {legal}.")
    return {**rule.options, **given}
