"""Scores of all components of all linears; knows spectra, importances and shapes, and no module.

UniRank (arXiv 2606.21847): `score(l, i) = I_{s(l)} * sigma_{l,i}² / Σ_j sigma_{l,j}²`. Its ablations are settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from unirank.errors import InputError, NonFiniteError
from unirank.types import CosineStat, Form, LinearSpec

Importance = Literal["sublayer", "block", "none"]
Distance = Literal["cosine", "angular"]
Local = Literal["energy", "sigma", "absolute", "global-only"]


@dataclass(frozen=True)
class ScoreSettings:
    """How components are scored; the defaults are UniRank's.

    Attributes:
        importance: where `I` is measured: the linear's "sublayer", the whole "block", or "none" (I = 1).
        distance: `1 - cos` ("cosine") or `arccos(cos) / π` ("angular"), of the mean token cosine.
        gamma: `I ** gamma`.
        local: "energy" (`sigma_i² / Σ sigma²`), "sigma" (`sigma_i / Σ sigma`), "absolute" (`sigma_i²`), or
            "global-only" (`K / i`: ranks become proportional to `I`).
        per_parameter: divide by what the component costs, `M + N` or in the pivoted form `M + N - 2 i + 1`.
    """

    importance: Importance = "sublayer"
    distance: Distance = "cosine"
    gamma: float = 1.0
    local: Local = "energy"
    per_parameter: bool = False

    def __post_init__(self) -> None:
        for name, legal in (("importance", Importance), ("distance", Distance), ("local", Local)):
            if getattr(self, name) not in get_args(legal):
                raise InputError(
                    f"{name} = {getattr(self, name)!r} is not legal; legal values: {', '.join(get_args(legal))}."
                )
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise InputError(f"gamma = {self.gamma} is not legal; it must be finite and at least 0.")


@dataclass(frozen=True)
class Components:
    """All components, linear after linear.

    Attributes:
        linears: the L targets, in order.
        value: float64 `[C]`, scores, non-increasing inside a linear.
        cost: int64 `[L]`, `M + N`.
        dense_cost: int64 `[L]`, `M N`.
        offsets: int64 `[L + 1]`, where each linear's components begin.
    """

    linears: tuple[LinearSpec, ...]
    value: torch.Tensor
    cost: torch.Tensor
    dense_cost: torch.Tensor
    offsets: torch.Tensor


def importance_of(stat: CosineStat, settings: ScoreSettings) -> float:
    """`I = 1 - cos` or `arccos(cos)/π`, to the power gamma; rounding below zero is clamped."""
    cosine = min(1.0, max(-1.0, stat.mean))
    distance = 1.0 - cosine if settings.distance == "cosine" else math.acos(cosine) / math.pi
    return distance**settings.gamma


def score(
    linears: Sequence[LinearSpec],
    energies: Mapping[str, torch.Tensor],
    cosines: Sequence[Mapping[str, CosineStat]],
    settings: ScoreSettings | None = None,
    form: Form = "factors",
    shares: Mapping[str, float] | None = None,
) -> Components:
    """Score every component.

    Args:
        linears: the targets.
        energies: float64 `[K]` of each, descending.
        cosines: per layer, statistics by "attention", "mlp", "block".
        settings: None is UniRank.
        form: in which low-rank matrices are stored; it matters to scores per parameter.
        shares: of the router's weight, by the matrices of experts; their importance is their sublayer's times that.

    Raises:
        NonFiniteError: an energy or a cosine is NaN or infinity; names the linear.
    """
    settings = settings or ScoreSettings()
    values = []
    for spec in linears:
        key = spec.sublayer if settings.importance == "sublayer" else "block"
        weight = 1.0 if settings.importance == "none" else importance_of(cosines[spec.layer][key], settings)
        if settings.importance != "none" and shares and spec.name in shares:
            weight *= shares[spec.name]
        value = weight * _local(energies[spec.name], settings.local)
        if settings.per_parameter:
            value = value / marginal_cost(spec, form)
        values.append(value)
    return assemble(linears, values)


def assemble(linears: Sequence[LinearSpec], values: Sequence[torch.Tensor]) -> Components:
    """Components from one score vector `[K]` a linear.

    Where scores rise inside a linear, a component takes the largest score behind it, so that a strong late component
    pulls the earlier ones with it and a prefix of the global order is a rank.

    Raises NonFiniteError when a score is NaN or infinity; names the linear.
    """
    for spec, value in zip(linears, values, strict=True):
        if not value.isfinite().all():
            raise NonFiniteError(f"The scores of {spec.name} are NaN or infinity.")
    monotone = [value.double().flip(0).cummax(0).values.flip(0) for value in values]
    lengths = torch.tensor([0, *(len(value) for value in monotone)])
    return Components(
        tuple(linears),
        torch.cat(monotone),
        torch.tensor([spec.cost for spec in linears]),
        torch.tensor([spec.params for spec in linears]),
        lengths.cumsum(0),
    )


def marginal_cost(spec: LinearSpec, form: Form) -> torch.Tensor:
    """What each component costs beyond those before it, float64 `[K]`: `M + N`, pivoted `M + N - 2 i + 1`."""
    cost = torch.full((spec.k,), spec.cost, dtype=torch.float64)
    return cost - 2 * torch.arange(spec.k) - 1 if form == "pivoted" else cost


def _local(energy: torch.Tensor, local: Local) -> torch.Tensor:
    if local == "absolute":
        return energy
    if local == "global-only":
        return len(energy) / torch.arange(1, len(energy) + 1, dtype=torch.float64)
    if local == "sigma":
        energy = energy.sqrt()
    total = energy.sum()
    # A matrix that is dead on the calibration tokens has nothing to keep.
    return energy / total if total > 0 else energy
