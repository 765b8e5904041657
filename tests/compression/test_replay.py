"""A layer that is run further and further: the bits of runs from the start, and no linear is computed twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unirank.compression.replay import Replay
from unirank.layerwise.recording import LayerCall, record
from unirank.layerwise.trace import traced_layer
from unirank.models.structure import weight_of
from unirank.types import LoadedModel

WINDOWS = torch.arange(3, 51).view(4, 12)


def alone(layer: nn.Module, call: LayerCall, x: torch.Tensor, path: str) -> torch.Tensor:
    """What enters the linear at `path` in a run from the start to the end."""
    seen: list[torch.Tensor] = []
    handle = layer.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    call.run(layer, x)
    handle.remove()
    return seen[0]


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights of all calls of `linear`, one for each."""
    weights: list[torch.Tensor] = []
    plain = F.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weights.append(weight)
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    return weights


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "opt"])
@torch.no_grad()
def test_stops_see_what_runs_from_the_start_see_and_no_linear_is_computed_twice(
    name: str, make_model: Callable[..., LoadedModel], multiplied: list[torch.Tensor]
) -> None:
    loaded = make_model(name)
    recording = record(loaded, WINDOWS, batch=2)
    layer, _ = traced_layer(loaded, 0, recording, recording.start.probe)
    calls, stream = [call[0] for call in recording.calls], recording.start.batches
    paths = [layer.path_of(spec.name) for spec in layer.specs]
    entered = recording.probe_calls[0], recording.start.probe
    replay = Replay(layer.module, calls, stream, paths, entered)
    readers: dict[str, list[str]] = {}
    for linear, owner in layer.trace.input_of.items():
        readers.setdefault(layer.path_of(owner), []).append(layer.path_of(linear))
    work = 0
    for owner, members in readers.items():
        multiplied.clear()
        found = list(replay.inputs(owner))
        work += len(multiplied)
        wanted = [alone(layer.module, call, x, owner) for call, x in zip(calls, stream, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        for member in members:  # as a fit would: another module with other weights
            parent, _, child = member.rpartition(".")
            old = layer.module.get_submodule(member)
            assert isinstance(old, nn.Linear)
            new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
            setattr(layer.module.get_submodule(parent), child, new)
    multiplied.clear()
    left = replay.outputs()
    work += len(multiplied)
    assert all(torch.equal(a, call.run(layer.module, x)) for a, call, x in zip(left, calls, stream, strict=True))
    assert work == len(calls) * len(paths)
    assert all("forward" not in module.__dict__ for module in layer.module.modules())


class Wrapper(nn.Module):
    """Runs its parts one after the other, or only one of them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor, only: str | None = None) -> torch.Tensor:
        for name in [only] if only else self.parts:
            x = self.parts[name](x)
        return x


class AddsInPlace(nn.Module):
    """Falcon adds to what a module gave, in its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (Wrapper(inner=nn.Linear(6, 6)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y += x
        y = y + self.second(y)
        return self.third(y)


class RunsOneTwice(nn.Module):
    """One module, two runs that give different things; each of its linears runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Wrapper(first=nn.Linear(6, 6), second=nn.Linear(6, 6))
        self.third = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.both(self.both(x, "first").tanh(), "second") + x)


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (AddsInPlace, [f"{name}.parts.inner" for name in ("first", "second", "third")]),
        (RunsOneTwice, ["both.parts.first", "both.parts.second", "third"]),
    ],
)
@torch.no_grad()
def test_layers_that_write_in_place_or_run_a_module_twice(make: Callable[[], nn.Module], paths: list[str]) -> None:
    torch.manual_seed(0)
    layer, call = make(), LayerCall((), {}, None)
    stream = [torch.randn(2, 3, 6) for _ in range(2)]
    replay = Replay(layer, [call, call], stream, paths, (call, stream[0][:1]))
    for path in paths:
        wanted = [alone(layer, call, x, path) for x in stream]
        assert all(torch.equal(a, b) for a, b in zip(replay.inputs(path), wanted, strict=True))
        weight_of(layer.get_submodule(path)).mul_(0.5)
    assert all(torch.equal(a, call.run(layer, x)) for a, x in zip(replay.outputs(), stream, strict=True))
