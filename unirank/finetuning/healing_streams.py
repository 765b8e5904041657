"""The two streams of healing, `x` of the dense model and `x'` of the compressed one, between two layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from unirank.analysis.hidden import Place, place_of
from unirank.disk.strictjson import Damaged
from unirank.disk.tensorfile import open_tensors, write_tensors
from unirank.errors import NonFiniteError
from unirank.layerwise.recording import LayerCall, Streams, record
from unirank.types import LoadedModel


@dataclass(frozen=True)
class Aim:
    """What a layer's output of one batch is compared with.

    Attributes:
        target: `m L(x) + (1 - m) L(x')`, float32 `[B, T, D]`, wherever the streams are.
        weight: `1 / ||L(x) S||²`, float32 `[B, T]`; 0 for a token whose `L(x) S` is 0.
        metric: `S`, float32 `[D, D]`; None is the identity.
    """

    target: torch.Tensor
    weight: torch.Tensor
    metric: torch.Tensor | None = None

    def error(self, output: torch.Tensor) -> torch.Tensor:
        """Mean over the batch's tokens of the squared relative error of `output [B, T, D]`; float32 scalar."""
        # From page-locked memory the copy waits for nothing, and the subtraction comes behind it.
        target = self.target.to(output.device, non_blocking=True)
        lost = _in(self.metric, target - output.float())
        return (lost.square().sum(-1) * self.weight).mean()


def _in(metric: torch.Tensor | None, vectors: torch.Tensor) -> torch.Tensor:
    return vectors if metric is None else vectors @ metric


@dataclass(frozen=True)
class Group:
    """Windows that go through both models together; `calls[batch][layer]` are the dense model's."""

    calls: list[list[LayerCall]]
    own_calls: list[list[LayerCall]]
    dense: Streams
    own: Streams

    @torch.no_grad()
    def aims(self, layer: nn.Module, index: int, mix: float, metric: torch.Tensor | None = None) -> list[Aim]:
        """Run the dense layer: the aims of every batch. `x` is then what leaves it.

        Raises NonFiniteError when its output is NaN or infinity.
        """
        found = []
        for position, (calls, hidden) in enumerate(zip(self.calls, self.dense.entering(), strict=True)):
            output = calls[index].run(layer, hidden)
            target = output.float()
            norms = _in(metric, target).square().sum(-1)
            if mix < 1:
                target = target.lerp(calls[index].run(layer, self.own.at(position)).float(), 1 - mix)
            weight = torch.where(norms > 0, 1 / norms, 0.0)
            if not bool((target.sum() + norms.sum()).isfinite()):
                raise NonFiniteError(f"The output of layer {index} of the dense model is NaN or infinity.")
            found.append(Aim(self.dense.away(target), weight, metric))
            self.dense.put(position, output)
        if self.dense.host is not None:
            self.dense.host.settle()
        return found

    @torch.no_grad()
    def advance(self, layer: nn.Module, index: int) -> None:
        """Run the compressed layer: `x'` is then what leaves it."""
        for position, (calls, hidden) in enumerate(zip(self.own_calls, self.own.entering(), strict=True)):
            self.own.put(position, calls[index].run(layer, hidden))


def start(
    dense: LoadedModel, own: LoadedModel, windows: Mapping[str, torch.Tensor], *, batch: int, place: Place
) -> dict[str, Group]:
    """The groups `windows` (int64 `[W, T]` by name) before layer 0, with streams and aims in `place`."""
    groups = {}
    for name, tokens in windows.items():
        where = {"folder": place.folder, "host": place.host}
        first, second = (record(model, tokens, batch=batch, **where) for model in (dense, own))
        groups[name] = Group(first.calls, second.calls, first.start, second.start)
    return groups


def place_for(dense: LoadedModel, windows: Mapping[str, torch.Tensor], work: Path, *, streamed: bool) -> Place:
    """Where both streams and the aims of `windows` (int64 `[W, T]` by name) are.

    In mapped files of `work` where models are streamed; else, as in an analysis, on the model's device, beside a GPU in
    the host's memory, or in such files, the first of them that has four times the room (see `place_of`).
    """
    if streamed:
        return Place(work, None, keep=False)
    size = torch.empty(0, dtype=dense.model.dtype).element_size()
    times = 2 + -(-4 // size)  # two streams in the model's dtype, and the aims in float32
    return place_of(dense, torch.cat(list(windows.values())).expand(times, -1, -1), work, limit=None, keep=False)


def write_streams(path: Path, groups: Mapping[str, Group]) -> None:
    """Keep the streams for a run that resumes. Raises WriteError like `write_tensors`."""
    tensors = {
        f"{name}.{side}.{position}": hidden
        for name, group in groups.items()
        for side, streams in (("dense", group.dense), ("own", group.own))
        for position, hidden in enumerate(streams.batches)
    }
    for group in groups.values():
        for streams in (group.dense, group.own):
            if streams.host is not None:
                streams.host.settle()
    write_tensors(path, tensors, {})


def read_streams(path: Path, groups: Mapping[str, Group]) -> bool:
    """Put what `write_streams` kept into `groups`; False, and nothing done, where the file is not whole."""
    try:
        with open_tensors(path) as file:
            places = {
                f"{name}.{side}.{position}": (streams, position)
                for name, group in groups.items()
                for side, streams in (("dense", group.dense), ("own", group.own))
                for position in range(len(streams.batches))
            }
            if set(file.names()) != places.keys():
                return False
            for name in places:
                file[name]  # its bytes are checked before anything is put
            for name, (streams, position) in places.items():
                # A copy, which begins where torch begins its memory: BLAS adds in another order elsewhere.
                streams.put(position, file[name].to(streams.batches[position].device, copy=True))
    except Damaged:
        return False
    return True
