"""Ranks that were found elsewhere: another store, another scheme, another program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unirank.analysis.store import AnalysisStore
from unirank.disk.strictjson import parse_object
from unirank.errors import InputError
from unirank.rank_plan import RankPlan, canonical, check_form
from unirank.types import DENSE, Form, LinearSpec, Rank


def import_plan(store: AnalysisStore, text: str, *, form: Form | None = None) -> RankPlan:
    """The plan for `store` that `text` gives: JSON as `read_ranks` takes it.

    A plan that was made from this store is taken as it is. From anything else come the ranks alone: budget = used,
    their recount; `remove = 1 - used / total`; allocator "imported". `settings` say where a full plan came from.

    Args:
        form: in which low-rank matrices are stored; None is that of a full plan, and "factors" for ranks alone.

    Raises InputError like `read_ranks`, StoreError when the store is unfinished, or too old for the form.
    """
    form = form_of(text, form)
    ranks = read_ranks(store.linears, text, form=form)
    store.require_complete()
    store.require_form(form)
    source = RankPlan.from_json(text) if _is_plan(parse_object(text)) else None
    if source is not None and (source.analysis, source.form, source.ranks) == (store.digest, form, ranks):
        return source
    shapes = {spec.name: (spec.m, spec.n) for spec in store.linears}
    used = sum(spec.rank_cost(ranks[spec.name], form) for spec in store.linears)
    keys = ("allocator", "scheme", "analysis")
    return RankPlan(
        ranks=ranks,
        shapes=shapes,
        remove=1 - used / sum(spec.params for spec in store.linears),
        budget=used,
        used=used,
        threshold=None,
        allocator="imported",
        scheme=store.identity.scheme,
        settings={} if source is None else {f"from_{key}": getattr(source, key) for key in keys},
        analysis=store.digest,
        form=form,
    )


def form_of(text: str, form: Form | None) -> Form:
    """`form`, or where it is None that of the plan that `text` is; "factors" for ranks alone, and what is no JSON."""
    if form is not None:
        check_form(form)
        return form
    try:
        record = parse_object(text)
    except ValueError:
        return "factors"  # `read_ranks` says what is wrong with it
    return RankPlan.from_json(text).form if _is_plan(record) else "factors"


def read_ranks(linears: Sequence[LinearSpec], text: str, *, form: Form | None = None) -> dict[str, Rank]:
    """Ranks of all `linears`, in their order, from JSON: a plan of `RankPlan.to_json`, or `{"ranks": RANKS}`, or RANKS.

    RANKS is an object of linear names and ranks, 1 to K or "dense". A rank that would cost as much as the matrix, in
    the form as `import_plan` takes it, is "dense".

    Raises InputError when the text is none of these, a full plan is not sound, a name is missing or unknown, or a rank
    is not legal.
    """
    try:
        record = parse_object(text)
    except ValueError as error:
        raise InputError(
            f"The ranks are not legal: {error}; they are a rank plan of unirank, or a JSON object of linear names and "
            'ranks, such as {"ranks": {"model.layers.0.mlp.up_proj": 64}}.'
        ) from error
    found: Any = RankPlan.from_json(text).ranks if _is_plan(record) else record
    if isinstance(found, Mapping) and isinstance(found.get("ranks"), Mapping):
        found = found["ranks"]
    names = {spec.name for spec in linears}
    for kind, wrong in (("unknown", found.keys() - names), ("missing", names - found.keys())):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise InputError(
                f"The ranks do not fit the model: {kind} linear {min(wrong)!r}{more}; there must be one rank for each "
                f"of its {len(names)} target linears, such as {linears[0].name!r}."
            )
    for spec in linears:
        rank = found[spec.name]
        if rank != DENSE and not (type(rank) is int and 1 <= rank <= spec.k):
            raise InputError(f"The rank {rank!r} of {spec.name} is not legal; legal are 1 to {spec.k} and {DENSE!r}.")
    form = form_of(text, form)
    return {spec.name: canonical(spec, found[spec.name], form) for spec in linears}


def read_rank_file(path: Path) -> str:
    """The text of a file of ranks; raises InputError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The file of ranks {path} cannot be read: {error}.") from error


def _is_plan(record: Any) -> bool:
    return isinstance(record, Mapping) and "format" in record
