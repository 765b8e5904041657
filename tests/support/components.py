"""Made-up components for the rules that rank them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from unirank.analysis.store import AnalysisStore
from unirank.planning.allocator import allocator
from unirank.planning.allocator.base import Request
from unirank.planning.score import ScoreSettings
from unirank.rank_plan import budget_of
from unirank.types import CosineStat, Form, LinearSpec

SHAPES = {
    "q_proj": (32, 32),
    "k_proj": (16, 32),
    "v_proj": (16, 32),
    "o_proj": (32, 32),
    "up": (48, 32),
    "down": (32, 48),
}


@dataclass(frozen=True)
class Gradients(AnalysisStore):
    """A store of nothing but gradients' estimates, in memory."""

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def slopes(self) -> dict[str, torch.Tensor]:
        return dict(self.values)

    def curvatures(self) -> dict[str, torch.Tensor]:
        return {name: slope.abs() for name, slope in self.values.items()}


def make_request(
    linears: list[LinearSpec],
    energies: Mapping[str, torch.Tensor],
    cosines: list[dict[str, CosineStat]],
    remove: float,
    *,
    settings: ScoreSettings | None = None,
    min_rank: int = 1,
    multiple_of: int = 1,
    slopes: Mapping[str, torch.Tensor] | None = None,
    form: Form = "factors",
) -> Request:
    budget = budget_of(remove, sum(spec.params for spec in linears))
    store = Gradients(Path("none"), {}, tuple(linears), values=slopes or {})
    settings = settings or ScoreSettings()
    request = Request(tuple(linears), energies, cosines, settings, remove, budget, min_rank, multiple_of, store, {})
    return replace(request, form=form)


def allocate(name: str, request: Request, **options: float) -> list[int]:
    """Ranks by the rule `name` with its default options, or these."""
    rule = allocator(name)
    return rule.allocate(replace(request, options={**rule.options, **options}))[0]


def request_of(
    seed: int,
    layers: int,
    remove: float,
    min_rank: int = 1,
    multiple_of: int = 1,
    scale: int = 1,
    form: Form = "factors",
    **kwargs,
) -> Request:
    """A synthetic model of `layers` layers with 6 linears each; some spectra have ties, some have dead tails."""
    generator = torch.Generator().manual_seed(seed)
    linears, energies, cosines, slopes = [], {}, [], {}
    for layer in range(layers):
        for position, (kind, (m, n)) in enumerate(SHAPES.items()):
            sublayer = "attention" if position < 4 else "mlp"
            spec = LinearSpec(f"l.{layer}.{kind}", layer, sublayer, f"{sublayer}.{kind}", m * scale, n * scale)
            decay = torch.rand((), generator=generator, dtype=torch.float64) * 0.3 / scale
            spectrum = torch.exp(-decay * torch.arange(spec.k, dtype=torch.float64))
            if position == 1:
                spectrum = (spectrum * 8).round() / 8
            linears.append(spec)
            energies[spec.name] = spectrum
            slopes[spec.name] = torch.randn(spec.k, generator=generator, dtype=torch.float64)
        cosines.append(
            {
                key: CosineStat(10 * (1 - float(torch.rand((), generator=generator))), 10.0, 10)
                for key in ("attention", "mlp", "block")
            }
        )
    settings = ScoreSettings(**kwargs)
    rounding = {"min_rank": min_rank, "multiple_of": multiple_of}
    return make_request(linears, energies, cosines, remove, settings=settings, slopes=slopes, form=form, **rounding)


def reachable(request: Request) -> bool:
    least = -(-request.min_rank // request.multiple_of) * request.multiple_of
    return cost(request, [min(least, spec.k) for spec in request.linears]) <= request.budget


def cost(request: Request, ranks: list[int]) -> int:
    return sum(spec.rank_cost(rank, request.form) for spec, rank in zip(request.linears, ranks, strict=True))
