"""One number a linear, found by running the model: alone, or inside of a compressed model; kept in the store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unirank.disk.hashing import sha256_tensors
from unirank.errors import InputError
from unirank.layerwise.lending import lent
from unirank.planning.allocator.base import Request
from unirank.planning.allocator.divergence import ALL, Counted
from unirank.planning.allocator.measure import (
    divergences,
    first_windows,
    low_rank_of,
    truncated_modules,
    whole,
    workbench_of,
)
from unirank.types import LinearSpec

_SQUARED = " squared"  # behind a linear's name: the mean over tokens of the squared divergence


@dataclass(frozen=True)
class Probe:
    """On which tokens a model is measured, and how.

    Attributes:
        windows: int64 `[W, T]`, T = `counted.first` + the tokens that count.
        precision: a linear is not measured on further windows once the standard error of its mean over tokens is at
            most this share of it; 0 measures on all.
    """

    windows: torch.Tensor
    counted: Counted = ALL
    precision: float = 0.0

    def settings(self) -> dict[str, Any]:
        """All that what is measured depends on, besides ranks and the store."""
        found: dict[str, Any] = {"windows_sha256": sha256_tensors([("windows", self.windows)])}
        if self.counted != ALL:  # so that what was measured before there was a choice still counts
            found |= {"temperature": self.counted.temperature, "first": self.counted.first}
        return found | ({"precision": self.precision} if self.precision else {})


def probe_of(request: Request) -> Probe:
    """By the options `windows`, `tokens`, `temperature`, `first` and `precision`. Raises InputError."""
    counted = Counted(request.options["temperature"], whole(request, "first", least=0))
    for name, legal in (("temperature", counted.temperature > 0), ("precision", request.options["precision"] >= 0)):
        if not legal:
            raise InputError(f"The option {name} = {request.options[name]} is not legal; it must be above 0.")
    tokens = whole(request, "tokens", least=2)
    windows = first_windows(workbench_of(request), whole(request, "windows"), counted.first + tokens)
    if windows.shape[1] <= counted.first:
        raise InputError(
            f"The option first = {counted.first} is not legal; the calibration windows have {windows.shape[1]} tokens, "
            "and it must be below that."
        )
    return Probe(windows, counted, request.options["precision"])


def probed(
    request: Request,
    probe: Probe,
    stage: str,
    points: Mapping[str, int],
    base: Sequence[int] | None = None,
) -> dict[str, float]:
    """`KL(dense || model with one linear at its point)` of every linear of `points`, in nats; mean over tokens.

    Args:
        stage: what the progress display says.
        base: ranks of a plan. Then every linear is changed inside of the model that it compresses, and the number is
            the divergence with it less the divergence of the plan.

    What is found on each window is kept in the store, so that a run that was killed goes on with the next window, and
    the result is kept, for the next plan. Raises like `divergences`.
    """
    settings = probe.settings() | {"ranks": dict(points)}
    rule = "lems"
    if base is not None:
        settings |= {"base": {spec.name: rank for spec, rank in zip(request.linears, base, strict=True)}}
        rule = "lems-inside"
    keys = None if len(points) == len(request.linears) else list(points)
    return request.store.measured(rule, settings, lambda: _all_windows(request, probe, stage, points, base), keys)


def _all_windows(
    request: Request, probe: Probe, stage: str, points: Mapping[str, int], base: Sequence[int] | None
) -> dict[str, float]:
    workbench = workbench_of(request)
    steps = len(probe.windows) * len(request.linears)
    total, squares = dict.fromkeys(points, 0.0), dict.fromkeys(points, 0.0)
    windows = dict.fromkeys(points, 0)
    waiting = dict(points)
    tokens = probe.windows.shape[1] - probe.counted.first
    workbench.progress(stage, 0, steps)
    for number, ids in enumerate(probe.windows):
        done = number * len(request.linears)
        one = Probe(ids[None], probe.counted)
        found = _one_window(request, one, stage, waiting, base, done, steps)
        for name in list(waiting):
            total[name] += found[name]
            squares[name] += found[name + _SQUARED]
            windows[name] += 1
            mean, square = total[name] / windows[name], squares[name] / windows[name]
            error = math.sqrt(max(0.0, square - mean * mean) / (windows[name] * tokens))
            if probe.precision and error <= probe.precision * abs(mean):
                del waiting[name]
    workbench.progress(stage, steps, steps)
    return {name: total[name] / windows[name] for name in points}


def _one_window(
    request: Request,
    probe: Probe,
    stage: str,
    points: Mapping[str, int],
    base: Sequence[int] | None,
    done: int,
    steps: int,
) -> dict[str, float]:
    """Mean and mean square over tokens of every linear; from the store where that window was measured before."""
    workbench = workbench_of(request)
    loaded = workbench.loaded

    def compressed(spec: LinearSpec) -> nn.Module | None:
        if spec.name not in points:
            return None
        if points[spec.name] >= spec.dense_rank(request.form):
            return originals[spec.name]
        return low_rank_of(request.store, spec, originals[spec.name], points[spec.name])

    def measured(_spec: LinearSpec) -> None:
        nonlocal done
        done += 1
        workbench.progress(stage, done, steps)

    originals = {spec.name: loaded.model.get_submodule(spec.name) for spec in request.linears}

    def measure() -> dict[str, float]:
        with lent(loaded.model):
            modules = None if base is None else truncated_modules(request, base)
            found = divergences(loaded, probe.windows[0], compressed, measured, counted=probe.counted, base=modules)
        means = {name: float(values.mean()) for name, values in found.items()}
        return means | {name + _SQUARED: float(values.square().mean()) for name, values in found.items()}

    if not points:
        return {}
    settings = probe.settings() | {"ranks": dict(points)}
    if base is not None:
        settings |= {"base": list(base)}
    keys = [*points, *(name + _SQUARED for name in points)]
    return request.store.measured("window", settings, measure, keys)
