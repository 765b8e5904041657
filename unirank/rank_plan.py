"""A rank plan: ranks for one exact budget, without any module or tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from statistics import median
from typing import Any

from unirank import looks
from unirank.disk.strictjson import Damaged, entry, parse_object
from unirank.errors import InputError
from unirank.types import DENSE, FORMS, Form, LinearSpec, Rank, rank_cost, stack_of

_PLACE = re.compile(r"^(?P<layers>.*?)\.(?P<layer>\d+)\.(?P<kind>.+)$")


@dataclass(frozen=True)
class RankPlan:
    """Ranks for one exact budget; the whole truth about an allocation, without any module or tensor."""

    ranks: Mapping[str, Rank]
    shapes: Mapping[str, tuple[int, int]]  # (M, N)
    remove: float
    budget: int
    used: int
    threshold: float | None  # score of the last kept component; None for rules without scores
    allocator: str
    scheme: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    analysis: str = ""  # sha256 of the store's identity
    form: Form = "factors"  # in which low-rank matrices are stored, and their parameters counted

    def __post_init__(self) -> None:
        recount = sum(self.rank_cost(name) for name in self.ranks)
        if recount != self.used or self.used > self.budget:
            raise InputError(
                f"The plan is not sound: its ranks cost {recount} parameters, it says used = {self.used} "
                f"and budget = {self.budget}; used must equal the recount and be at most the budget."
            )

    def rank_cost(self, name: str) -> int:
        return rank_cost(*self.shapes[name], self.ranks[name], self.form)

    @property
    def total(self) -> int:
        return sum(m * n for m, n in self.shapes.values())

    @property
    def described_form(self) -> str:
        """How low-rank matrices are stored, and what a rank costs."""
        cost = "R (M + N - R)" if self.form == "pivoted" else "R (M + N)"
        return f"{self.form}, {cost} parameters a matrix"

    def described_settings(self) -> str:
        """The settings in one line; of those that hold a value a linear, how many there are."""

        def shown(value: Any) -> str:
            return f"{len(value)} values" if isinstance(value, list | dict) and len(value) > 10 else str(value)

        return ", ".join(f"{key} = {shown(value)}" for key, value in sorted(self.settings.items()))

    def __repr__(self) -> str:
        ranks = sorted(int(rank) for rank in self.ranks.values() if rank != DENSE)
        dense = len(self.ranks) - len(ranks)
        spread = f"ranks {ranks[0]} to {ranks[-1]}, median {median(ranks):g}; " if ranks else ""
        removed = 1 - self.used / self.total if self.total else 0.0
        settings = self.described_settings()
        return looks.lines(
            f"RankPlan: {removed:.2%} of {self.total:,} parameters removed, {len(self.ranks)} linears",
            f"{self.used:,} kept, of a budget of {self.budget:,}; {self.described_form}",
            f"allocator {self.allocator}, scheme {self.scheme}" + (f"; {settings}" if settings else ""),
            f"{spread}{dense} stay dense",
            "next: unirank.apply(loaded, store, plan); .ranks[name]; .to_json()",
        )

    def _repr_html_(self) -> str:
        return looks.text(repr(self)) + self.heat_map()

    def heat_map(self) -> str:
        """The kept fraction of every linear's parameters, layer by projection, as an HTML table.

        The experts of a stack share a cell, with their mean.
        """
        cells = []
        stacks: dict[str, list[str]] = {}
        for name in self.ranks:
            stacks.setdefault(stack_of(name) or name, []).append(name)
        for name, members in stacks.items():
            m, n = self.shapes[members[0]]
            place = _PLACE.match(name)
            layer, kind = (int(place["layer"]), place["kind"]) if place else (0, name)
            kept = sum(map(self.rank_cost, members)) / (m * n * len(members))
            said = described_ranks([self.ranks[member] for member in members])
            said = said if said == DENSE else f"rank {said}"
            cells.append((layer, kind, kept, f"{name}: {said} of {min(m, n)}"))
        return looks.heat(cells)

    def renamed(self, places: Mapping[str, str]) -> RankPlan:
        """The same plan for a model in which linears have other names, `places[name]`."""
        ranks, shapes = ({places[name]: one for name, one in of.items()} for of in (self.ranks, self.shapes))
        return self if ranks.keys() == self.ranks.keys() else replace(self, ranks=ranks, shapes=shapes)

    def to_json(self) -> str:
        record = asdict(self)
        record["format"] = 1
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Read `to_json`'s output. Raises InputError for anything else."""
        try:
            record = parse_object(text)
            if entry(record, "format", int) != 1:
                raise Damaged("unknown format")
            del record["format"]
            cls._check(record)
        except Damaged as error:
            raise InputError(f"This is not a unirank rank plan: {error}.") from error
        shapes = {name: (m, n) for name, (m, n) in record["shapes"].items()}
        return cls(**{**record, "shapes": shapes})

    @staticmethod
    def _check(record: Mapping[str, Any]) -> None:
        """Raise Damaged unless every entry has a value that `to_json` could have written."""
        known = {field.name for field in fields(RankPlan)}
        for key in sorted(known - record.keys() - {"settings", "analysis", "form"}):
            raise Damaged(f"it has no {key}")
        for key in sorted(record.keys() - known):
            raise Damaged(f"it has the unknown entry {key[:80]!r}")
        remove, threshold = record["remove"], record["threshold"]
        good = {
            "ranks": isinstance(record["ranks"], dict),
            "shapes": isinstance(record["shapes"], dict)
            and all(
                isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
                for shape in record["shapes"].values()
            ),
            "remove": type(remove) in (int, float) and 0 <= remove < 1,
            "budget": type(record["budget"]) is int,
            "used": type(record["used"]) is int,
            "threshold": threshold is None or type(threshold) in (int, float),
            "allocator": isinstance(record["allocator"], str),
            "scheme": isinstance(record["scheme"], str),
            "settings": isinstance(record.get("settings", {}), dict),
            "analysis": isinstance(record.get("analysis", ""), str),
            "form": record.get("form", "factors") in FORMS,
        }
        for key, fine in good.items():
            if not fine:
                raise Damaged(f"{key} is {str(record[key])[:80]!r}")
        if record["ranks"].keys() != record["shapes"].keys():
            raise Damaged("ranks and shapes name different linears")
        for name, rank in record["ranks"].items():
            most = min(record["shapes"][name]) - (record.get("form") == "pivoted")  # there, K is dense
            if rank != DENSE and not (type(rank) is int and 1 <= rank <= most):
                raise Damaged(f"rank of {name} is {str(rank)[:80]!r}, legal is 1 to {most} or {DENSE!r}")


def described_ranks(ranks: Sequence[Rank]) -> str:
    """The rank of one matrix, or from which to which those of several go, and how many of these are dense."""
    numbers = sorted(int(rank) for rank in ranks if rank != DENSE)
    if not numbers:
        return DENSE
    spread = str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"
    dense = len(ranks) - len(numbers)
    return f"{spread}, {dense} {DENSE}" if dense else spread


def canonical(spec: LinearSpec, rank: Rank, form: Form = "factors") -> Rank:
    """The rank, or "dense" where it would cost as much as the matrix."""
    return DENSE if spec.rank_cost(rank, form) == spec.params else rank


def check_form(form: str) -> Form:
    """`form`; raises InputError unless there is such a form."""
    for known in FORMS:
        if form == known:
            return known
    raise InputError(f"form = {form!r} is not legal; legal values: {', '.join(FORMS)}.")


def budget_of(remove: float, total: int) -> int:
    """`B = floor((1 - remove) * total)`; raises InputError unless `remove` lies in [0, 1)."""
    if isinstance(remove, bool) or not isinstance(remove, int | float) or not 0 <= remove < 1:
        raise InputError(
            f"remove = {remove!r} is not legal: it is the fraction of the target weights to remove, "
            "at least 0 and less than 1 (0.2 removes 20 %)."
        )
    # Exact arithmetic on the decimal that the user wrote, not on its binary neighbour: (1 - 0.9) * 10 must give 1.
    return math.floor((1 - Fraction(repr(float(remove)))) * total)
