"""Ranks that were found elsewhere: another store, another scheme, another program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unirank.analysis.store import AnalysisStore
from unirank.disk.strictjson import parse_object
from unirank.errors import InputError
from unirank.rank_plan import RankPlan, canonical
from unirank.types import DENSE, LinearSpec, Rank


def import_plan(store: AnalysisStore, text: str) -> RankPlan:
    """The plan for `store` that `text` gives: JSON as `read_ranks` takes it.

    A plan that was made from this store is taken as it is. From anything else come the ranks alone: budget = used,
    their recount; `remove = 1 - used / total`; allocator "imported". `settings` say where a full plan came from.

    Raises InputError like `read_ranks`, StoreError when the store is unfinished.
    """
    ranks = read_ranks(store.linears, text)
    store.require_complete()
    source = RankPlan.from_json(text) if _is_plan(parse_object(text)) else None
    if source is not None and source.analysis == store.digest and source.ranks == ranks:
        return source
    shapes = {spec.name: (spec.m, spec.n) for spec in store.linears}
    used = sum(spec.rank_cost(ranks[spec.name]) for spec in store.linears)
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
    )


def read_ranks(linears: Sequence[LinearSpec], text: str) -> dict[str, Rank]:
    """Ranks of all `linears`, in their order, from JSON: a plan of `RankPlan.to_json`, or `{"ranks": RANKS}`, or RANKS.

    RANKS is an object of linear names and ranks, 1 to K or "dense". A rank whose factors would cost as much as the
    matrix is "dense".

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
    return {spec.name: canonical(spec, found[spec.name]) for spec in linears}


def read_rank_file(path: Path) -> str:
    """The text of a file of ranks; raises InputError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The file of ranks {path} cannot be read: {error}.") from error


def _is_plan(record: Any) -> bool:
    return isinstance(record, Mapping) and "format" in record
