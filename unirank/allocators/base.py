"""What an allocator is: a function from spectra and a budget to ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from unirank import ops
from unirank.errors import InputError
from unirank.score import Components, ScoreSettings
from unirank.types import CosineStat, LinearSpec


@dataclass(frozen=True)
class Request:
    """What an allocator is asked: linears, their spectra and cosines, and the budget in parameters."""

    linears: tuple[LinearSpec, ...]
    energies: Mapping[str, torch.Tensor]
    cosines: Sequence[Mapping[str, CosineStat]]
    settings: ScoreSettings
    remove: float
    budget: int
    min_rank: int
    multiple_of: int


@dataclass(frozen=True)
class Allocator:
    """A rule: `allocate` returns ranks (K means dense) in the order of the linears, and the threshold or None.

    `scored` says whether the score settings matter to it.
    """

    name: str
    scored: bool
    allocate: Callable[[Request], tuple[list[int], float | None]]


def take_best(components: Components, request: Request) -> tuple[list[int], float | None]:
    """Keep the best components up to the budget (method 2): `ops.global_topk`.

    Raises InputError when `min_rank` alone exceeds the budget.
    """
    check_floor(request.linears, request.remove, request.budget, request.min_rank, request.multiple_of)
    ranks, threshold = ops.global_topk(
        components.value,
        components.cost,
        components.dense_cost,
        components.offsets,
        request.budget,
        request.min_rank,
        request.multiple_of,
    )
    value = float(threshold)
    return ranks.tolist(), value if value != float("inf") else None


def check_floor(linears: Sequence[LinearSpec], remove: float, budget: int, min_rank: int, multiple_of: int) -> None:
    """Raise InputError when `min_rank` alone exceeds the budget."""
    least = -(-min_rank // multiple_of) * multiple_of
    floor = sum(spec.rank_cost(min(least, spec.k)) for spec in linears)
    if floor > budget:
        raise InputError(
            f"remove = {remove} cannot be reached: min_rank = {min_rank} with multiple_of = {multiple_of} already "
            f"needs {floor} parameters and the budget is {budget}."
        )
