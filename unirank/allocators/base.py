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
    floor = _floor_cost(request)
    if floor > request.budget:
        raise InputError(
            f"remove = {request.remove} cannot be reached: min_rank = {request.min_rank} with multiple_of = "
            f"{request.multiple_of} already needs {floor} parameters and the budget is {request.budget}."
        )
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


def _floor_cost(request: Request) -> int:
    step = request.multiple_of
    return sum(spec.rank_cost(min(-(-request.min_rank // step) * step, spec.k)) for spec in request.linears)
