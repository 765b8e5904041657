"""Swaps of parameters between matrices, kept when the whole model gains (after EvoPress, ICML 2025)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unirank.disk.hashing import sha256_text
from unirank.planning.allocator.base import Request
from unirank.planning.allocator.curves import Curve, digest_of
from unirank.planning.allocator.held_out import HeldOut, Walk
from unirank.planning.allocator.measure import replaced, workbench_of
from unirank.types import LinearSpec

_STAGE = "swap ranks"
_ROUND = 20  # trials between two files in the store
_FEW = 0.2  # of a round's trials kept: below, the next round's are smaller
_STEP = 0.05  # the first step: this share of what a matrix costs at the mean
_DRAWS = 20  # for a swap that was not tried at these ranks
_SPREAD = 0.25  # variance of a curve's factor before anything is tried


@dataclass
class _State:
    """Where the search stands.

    Attributes:
        places: of each matrix's rank in its curve.
        factor, variance: of each curve: measured over expected, float64 `[L]`.
        step: parameters that a matrix gives or takes.
        pairs: matrices that give, and that take, in one trial.
    """

    places: list[int]
    factor: torch.Tensor
    variance: torch.Tensor
    step: float
    pairs: int
    kept: int = 0
    divergence: float = 0.0

    def to_values(self, names: Sequence[str]) -> dict[str, float]:
        found = {"step": self.step, "pairs": float(self.pairs), "kept": float(self.kept), "divergence": self.divergence}
        for name, place, factor, variance in zip(names, self.places, self.factor, self.variance, strict=True):
            found |= {name: float(place), f"{name} factor": float(factor), f"{name} variance": float(variance)}
        return found

    @classmethod
    def from_values(cls, names: Sequence[str], values: dict[str, float]) -> _State:
        return cls(
            [int(values[name]) for name in names],
            torch.tensor([values[f"{name} factor"] for name in names], dtype=torch.float64),
            torch.tensor([values[f"{name} variance"] for name in names], dtype=torch.float64),
            values["step"],
            int(values["pairs"]),
            int(values["kept"]),
            values["divergence"],
        )


def swapped(
    request: Request,
    curves: Sequence[Curve],
    ranks: Sequence[int],
    held: HeldOut,
    tried: int,
    *,
    seed: int,
) -> tuple[list[int], dict[str, Any]]:
    """`ranks` after `tried` swaps: some matrices give a step of parameters, others take it, within the budget.

    A swap is kept when the divergence of the whole model from the dense one falls on held-out windows (`Walk`).
    Which matrices: the curves, all scaled so that they add up to the plan's divergence, predict what a step costs or
    gains; each has a factor that is not known, normal around 1 with variance 0.25. The factors are drawn; by this draw,
    those matrices give that lose least, and those take that gain most (Thompson sampling). What was measured then
    corrects the factors (one Kalman step with the diagonal of the covariance). **Choices**: all of it; EvoPress draws
    uniformly. While few swaps are kept, pairs, then the step, halve.

    Every 20 trials the state is kept in the store, so that a run that was killed goes on there.

    Returns also the number of swaps kept, and the divergence at the end, in nats.
    """
    names = [spec.name for spec in request.linears]
    used = sum(int(curve.costs[curve.place(rank)]) for curve, rank in zip(curves, ranks, strict=True))
    state = _State(
        [curve.place(rank) for curve, rank in zip(curves, ranks, strict=True)],
        torch.ones(len(names), dtype=torch.float64),
        torch.full((len(names),), _SPREAD, dtype=torch.float64),
        max(1.0, _STEP * used / len(names)),
        max(1, min(8, len(names) // 4)),
    )
    keys = list(state.to_values(names))
    common = held.settings() | {"curves": digest_of(curves), "budget": request.budget, "form": request.form}
    before = common | {"ranks": list(ranks), "seed": seed}
    walker = _Walker(request, curves)
    progress = workbench_of(request).progress
    for start in range(0, tried, _ROUND):
        count = min(_ROUND, tried - start)

        def measure(state: _State = state, start: int = start, count: int = count) -> dict[str, float]:
            generator = torch.Generator().manual_seed(seed + start)
            with replaced(walker.model, walker.dense):
                walk = Walk(request, held, walker.ranks(state))
                scale = walker.scale(state, walk.divergence) if start == 0 else 1.0
                state.factor *= scale
                state.variance *= scale * scale
                kept, seen = 0, {tuple(state.places)}
                for trial in range(count):
                    progress(_STAGE, start + trial, tried)
                    kept += walker.trial(walk, state, generator, seen)
                state.kept += kept
                state.divergence = walk.divergence
            if kept < _FEW * count:
                if state.pairs > 1:
                    state.pairs //= 2
                else:
                    state.step = max(1.0, state.step / 2)
            return state.to_values(names)

        settings = {"before": sha256_text(json.dumps(before, sort_keys=True)), "start": start, "count": count}
        values = request.store.measured("lems-swaps", settings, measure, keys)
        state = _State.from_values(names, values)
        before = values
    progress(_STAGE, tried, tried)
    return walker.ranks(state), {"swaps_kept": state.kept, "held_out_divergence": state.divergence}


class _Walker:
    """Trials of swaps."""

    def __init__(self, request: Request, curves: Sequence[Curve]) -> None:
        self._request, self._curves = request, curves
        self.model = workbench_of(request).loaded.model
        self.dense = {spec.name: self.model.get_submodule(spec.name) for spec in request.linears}

    def ranks(self, state: _State) -> list[int]:
        return [int(curve.ranks[place]) for curve, place in zip(self._curves, state.places, strict=True)]

    def scale(self, state: _State, divergence: float) -> float:
        """The divergence measured over the sum of the errors expected."""
        expected = sum(float(curve.errors[place]) for curve, place in zip(self._curves, state.places, strict=True))
        return divergence / expected if expected > 0 and divergence > 0 else 1.0

    def trial(self, walk: Walk, state: _State, generator: torch.Generator, tried: set[tuple[int, ...]]) -> bool:
        """Try one swap that leads to none of the places `tried`, and learn from it; False also where none is found."""
        for _ in range(_DRAWS):
            draw = state.factor + state.variance.sqrt() * torch.randn(len(self._curves), generator=generator).double()
            changes, effect = self._swap(state, draw.clamp_min(0.0))
            places = tuple(changes.get(l, place) for l, place in enumerate(state.places))
            if changes and places not in tried:
                break
        else:
            return False
        tried.add(places)
        specs: dict[LinearSpec, int] = {
            self._request.linears[l]: int(self._curves[l].ranks[place]) for l, place in changes.items()
        }
        change, error, kept = walk.try_ranks(specs)
        if change < float("inf"):
            gain = state.variance * effect
            spread = float((effect * gain).sum()) + error * error
            if spread > 0:
                missed = change - float((effect * state.factor).sum())
                state.factor = state.factor + gain * (missed / spread)
                state.variance = state.variance - gain * gain / spread
        if kept:
            for l, place in changes.items():
                state.places[l] = place
        return kept

    def _swap(self, state: _State, draw: torch.Tensor) -> tuple[dict[int, int], torch.Tensor]:
        """New places of some matrices within the budget, and what the curves alone expect of each: float64 `[L]`."""
        here = state.places
        costs = [int(curve.costs[place]) for curve, place in zip(self._curves, here, strict=True)]
        losses: dict[int, float] = {}
        gains: dict[int, float] = {}
        down = [self._reached(l, costs[l] - state.step) for l in range(len(costs))]
        for l, curve in enumerate(self._curves):
            if down[l] >= 0:
                losses[l] = self._rate(l, here[l], down[l], draw)
            if here[l] + 1 < len(curve.costs):
                gains[l] = self._rate(l, here[l], max(here[l] + 1, self._reached(l, costs[l] + state.step)), draw)
        givers = sorted(losses, key=lambda l: (losses[l], l))[: state.pairs]
        changes = {l: down[l] for l in givers}
        left = self._request.budget - sum(costs) + sum(costs[l] - int(self._curves[l].costs[down[l]]) for l in givers)
        takers = [l for l in sorted(gains, key=lambda l: (-gains[l], l)) if l not in changes]
        for l in takers:
            next_one = int(self._curves[l].costs[here[l] + 1]) - costs[l]
            last = len(changes) + 1 >= 2 * len(givers)
            place = self._reached(l, costs[l] + (left if last else min(left, max(state.step, next_one))))
            if place > here[l]:
                changes[l] = place
                left -= int(self._curves[l].costs[place]) - costs[l]
                if last:
                    break
        effect = torch.zeros(len(draw), dtype=torch.float64)
        for l, place in changes.items():
            effect[l] = self._curves[l].errors[place] - self._curves[l].errors[here[l]]
        return (changes, effect) if len(changes) > len(givers) else ({}, effect)

    def _reached(self, l: int, cost: float) -> int:
        """The last place that costs at most `cost`; -1 where none does."""
        return int(torch.searchsorted(self._curves[l].costs, int(cost), right=True)) - 1

    def _rate(self, l: int, here: int, there: int, draw: torch.Tensor) -> float:
        """Expected change of error by parameter between two places, as drawn."""
        curve = self._curves[l]
        error = float((curve.errors[there] - curve.errors[here]).abs())
        return float(draw[l]) * error / abs(int(curve.costs[there]) - int(curve.costs[here]))
