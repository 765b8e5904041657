"""The divergence of the whole compressed model on calibration windows on which nothing else was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from unirank.errors import InputError, NonFiniteError
from unirank.planning.allocator.base import Request
from unirank.planning.allocator.divergence import Window
from unirank.planning.allocator.measure import (
    first_windows,
    low_rank_of,
    replaced,
    truncated_modules,
    whole,
    workbench_of,
)
from unirank.planning.allocator.probing import Probe
from unirank.types import LinearSpec

_SURE = 2.0  # standard errors


def held_out_of(request: Request, probe: Probe) -> Probe:
    """The `held_out` windows behind those of `probe`, cut like them. Raises InputError when there are fewer."""
    used, count = len(probe.windows), whole(request, "held_out")
    windows = first_windows(workbench_of(request), used + count, probe.windows.shape[1])
    if len(windows) < used + count:
        raise InputError(
            f"depth, rounds and swaps need {count} calibration windows (the option held_out) beside the {used} that "
            f"are measured on, and there are {len(windows)} in all; take fewer, or calibrate on more."
        )
    return Probe(windows[used:], probe.counted)


class HeldOut:
    """Windows of the lent model; made and used inside `lent`, while the model is dense. See `Window` for the memory."""

    def __init__(self, request: Request, probe: Probe) -> None:
        self._request, self._probe = request, probe
        self._made: list[Window] | None = None

    @property
    def windows(self) -> list[Window]:
        """Made when they are first asked for."""
        if self._made is None:
            loaded = workbench_of(self._request).loaded
            self._made = [Window(loaded, ids, self._probe.counted) for ids in self._probe.windows]
        return self._made

    def settings(self) -> dict[str, Any]:
        return self._probe.settings()

    def divergence(self, ranks: Sequence[int]) -> float:
        """`KL(dense || model compressed to ranks)`, mean over tokens, in nats; from the store where it was measured.

        Raises NonFiniteError when it is NaN or infinity.
        """
        request = self._request
        settings = self.settings() | {"ranks": list(ranks)}

        def measure() -> dict[str, float]:
            windows = self.windows
            with replaced(workbench_of(request).loaded.model, truncated_modules(request, ranks)):
                found = [window.divergences(window.onward(window.entering, 0)) for window in windows]
            return {"divergence": _finite(torch.cat(found))}

        return request.store.measured("lems-whole", settings, measure, ["divergence"])["divergence"]


class Walk:
    """A lent model compressed to ranks that change a few at a time, with its divergence on held-out windows.

    Keeps what enters each layer, `[T, D]` a layer and window, so that a change runs from its layer on. Modules are put
    into the model itself: made inside of `replaced` over all linears.
    """

    def __init__(self, request: Request, held: HeldOut, ranks: Sequence[int]) -> None:
        self._request, self._windows = request, held.windows
        self._model = workbench_of(request).loaded.model
        self._dense = {spec.name: self._model.get_submodule(spec.name) for spec in request.linears}
        for name, module in truncated_modules(request, ranks).items():
            self._model.set_submodule(name, module)
        self._streams: list[dict[int, torch.Tensor]] = []
        values = []
        for window in self._windows:
            seen: dict[int, torch.Tensor] = {}
            values.append(window.divergences(window.onward(window.entering, 0, seen=seen.__setitem__))[0])
            self._streams.append(seen)
        self._tokens = torch.stack(values)
        _finite(self._tokens)

    @property
    def divergence(self) -> float:
        """Of the current ranks, in nats."""
        return float(self._tokens.mean())

    def try_ranks(self, changes: Mapping[LinearSpec, int]) -> tuple[float, float, bool]:
        """Change ranks; they stay where the divergence falls.

        Window by window: a rise of more than two standard errors of the tokens' differences ends it.

        Returns the change of the divergence and its standard error over the windows that ran, and whether it stayed.
        """
        modules = {spec.name: self._module(spec, rank) for spec, rank in changes.items()}
        start = min(spec.layer for spec in changes)
        values, streams = [], []
        with replaced(self._model, modules):
            for window, known in zip(self._windows, self._streams, strict=True):
                seen: dict[int, torch.Tensor] = {}
                values.append(window.divergences(window.onward(known[start], start, seen=seen.__setitem__))[0])
                streams.append(seen)
                if not bool(values[-1].isfinite().all()):
                    return float("inf"), float("inf"), False
                differences = torch.stack(values) - self._tokens[: len(values)]
                change = float(differences.mean())
                error = float(differences.std() / differences.numel() ** 0.5)
                if change > _SURE * error:
                    break
        if len(values) < len(self._windows) or change >= 0:
            return change, error, False
        for name, module in modules.items():
            self._model.set_submodule(name, module)
        for known, seen in zip(self._streams, streams, strict=True):
            known.update(seen)
        self._tokens = torch.stack(values)
        return change, error, True

    def _module(self, spec: LinearSpec, rank: int) -> nn.Module:
        dense = self._dense[spec.name]
        if rank >= spec.dense_rank(self._request.form):
            return dense
        return low_rank_of(self._request.store, spec, dense, rank)


def _finite(tokens: torch.Tensor) -> float:
    """The mean; raises NonFiniteError where it is none."""
    mean = tokens.mean()
    if not bool(mean.isfinite()):
        raise NonFiniteError("The output of the model that is compressed by its plan is NaN or infinity.")
    return float(mean)
