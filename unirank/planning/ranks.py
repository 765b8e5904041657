"""From spectra and a removed fraction to a rank plan: milliseconds, on any store, for any ratio and any allocator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from unirank.analysis.store import AnalysisStore
from unirank.errors import InputError
from unirank.planning.allocator import allocator as allocator_of
from unirank.planning.allocator.base import Request, Workbench, check_floor, options_of
from unirank.planning.score import ScoreSettings
from unirank.rank_plan import RankPlan, budget_of, canonical, check_form
from unirank.types import Form, LinearSpec, Rank, refuse_experts_for


def plan_ranks(
    store: AnalysisStore,
    remove: float,
    *,
    allocator: str = "unirank",
    settings: ScoreSettings | None = None,
    min_rank: int = 1,
    multiple_of: int = 1,
    options: Mapping[str, float] | None = None,
    workbench: Workbench | None = None,
    form: Form = "factors",
) -> RankPlan:
    """Ranks for every target of `store`, at most `floor((1 - remove) Σ M N)` parameters in total.

    Args:
        remove: the fraction of the targets' weight parameters to remove, in [0, 1).
        allocator: see `unirank.allocators()`.
        settings: score settings of the allocators that rank components; None is UniRank.
        min_rank: least rank of a matrix.
        multiple_of: ranks are multiples of this (dense matrices aside).
        options: the allocator's own options by name.
        workbench: the dense model and calibration windows, for allocators that measure (`swift`, `lems`, `ara`); see
            `unirank.make_workbench`. The model is left as it was found.
        form: in which low-rank matrices are stored, and so what a rank costs: "factors" `R (M + N)`, or "pivoted"
            `R (M + N - R)` (see `unirank.LowRankLinear`).

    Raises:
        InputError: an argument is not legal, or `min_rank` makes `remove` unreachable.
        StoreError: the store is unfinished or damaged, or too old for the form.
    """
    settings = settings or ScoreSettings()
    budget = check_request(
        store.linears,
        remove,
        allocator=allocator,
        min_rank=min_rank,
        multiple_of=multiple_of,
        options=options,
        form=form,
    )
    rule = allocator_of(allocator)
    chosen = options_of(rule, options or {})
    if rule.measures and workbench is None:
        raise InputError(
            f"The allocator {allocator} measures the model, so a plan needs the dense model; give it with against=."
        )
    if rule.gradients and not store.has_gradients:
        raise InputError(
            f"The allocator {allocator} needs gradients and the store {store.path} has none; "
            "make one that has them with: unirank analyze MODEL -o STORE --gradients 32."
        )
    store.require_complete()
    store.require_form(form)
    request = Request(
        store.linears,
        store.energies(),
        store.cosines(),
        settings,
        remove,
        budget,
        min_rank,
        multiple_of,
        store,
        chosen,
        workbench,
        form,
    )
    numbers, threshold, *learned = rule.allocate(request)
    ranks: dict[str, Rank] = {
        spec.name: canonical(spec, number, form) for spec, number in zip(store.linears, numbers, strict=True)
    }
    return RankPlan(
        ranks=ranks,
        shapes={spec.name: (spec.m, spec.n) for spec in store.linears},
        remove=remove,
        budget=budget,
        used=sum(spec.rank_cost(ranks[spec.name], form) for spec in store.linears),
        threshold=threshold,
        allocator=allocator,
        scheme=store.identity.scheme,
        settings={"min_rank": min_rank, "multiple_of": multiple_of}
        | chosen
        | (asdict(settings) if rule.scored else {})
        | (dict(learned[0]) if learned else {}),
        analysis=store.digest,
        form=form,
    )


def fitting_multiple(
    linears: Sequence[LinearSpec], remove: float, wanted: int, *, min_rank: int = 1, form: Form = "factors"
) -> int:
    """The largest of `wanted`, its half, its quarter, ... 1 that leaves an allocator room: what a preset falls back to.

    That is: every matrix at that rank takes at most a quarter of the budget (**choice**), and `min_rank` rounded up to
    it is within the budget. A matrix that has fewer components than the multiple stays dense. With no linears it is
    `wanted`.
    """
    if not linears:
        return wanted
    budget = budget_of(remove, sum(spec.params for spec in linears))

    def cost(rank: int) -> int:
        return sum(spec.rank_cost(min(rank, spec.k), form) for spec in linears)

    while wanted > 1 and (4 * cost(wanted) > budget or cost(-(-min_rank // wanted) * wanted) > budget):
        wanted //= 2
    return wanted


def check_request(
    linears: Sequence[LinearSpec],
    remove: float,
    *,
    allocator: str,
    min_rank: int,
    multiple_of: int,
    options: Mapping[str, float] | None = None,
    form: Form = "factors",
) -> int:
    """The budget of `linears`; raises InputError when `plan` could not honour these arguments.

    Cheap, so that callers ask before the analysis; with no linears it checks the arguments by themselves.
    """
    check_form(form)
    rule = allocator_of(allocator)
    chosen = options_of(rule, options or {})
    if rule.measures:
        refuse_experts_for(f"The allocator {allocator}", linears)
    if rule.check is not None:
        rule.check(linears, chosen)
    budget = budget_of(remove, sum(spec.params for spec in linears))
    for name, value in (("min_rank", min_rank), ("multiple_of", multiple_of)):
        if value < 1:
            raise InputError(f"{name} = {value} is not legal; it must be at least 1.")
    check_floor(linears, remove, budget, min_rank, multiple_of, form)
    return budget
