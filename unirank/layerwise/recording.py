"""A pass that records how the model calls its layers, and what enters the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unirank.disk.files import mapped_copy
from unirank.errors import InputError, NonFiniteError
from unirank.types import LoadedModel

# The structure of a layer does not depend on how many tokens it sees, so a few suffice to trace it.
PROBE_TOKENS = 8


@dataclass(frozen=True)
class LayerCall:
    """How the model calls one layer on one batch, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_by_name: str | None  # the keyword of the hidden states, or None when they come first by position

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output stream `[B, T, D]`."""
        if self.hidden_by_name is None:
            output = layer(hidden, *self.args, **self.kwargs)
        else:
            output = layer(*self.args, **{self.hidden_by_name: hidden}, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@dataclass
class Streams:
    """Hidden states between two layers, one tensor `[B, T, D]` a batch, and those of the probe.

    With a `folder`, batches are in mapped files there, and in memory only while a layer runs on them.
    """

    batches: list[torch.Tensor]
    probe: torch.Tensor
    folder: Path | None = None

    def put(self, position: int, hidden: torch.Tensor) -> None:
        """`hidden` takes the place of the batch at `position`, or is added behind the last one."""
        kept = hidden if self.folder is None else mapped_copy(self.folder, hidden)
        self.batches[position : position + 1] = [kept]


@dataclass(frozen=True)
class Recording:
    """What the recording pass saw: `calls[batch][layer]`, the probe's calls, and the streams that enter layer 0."""

    calls: list[list[LayerCall]]
    returns_tuple: bool  # whether a layer returns its hidden states in a tuple
    probe_calls: list[LayerCall]
    start: Streams


def layers_of(loaded: LoadedModel) -> list[nn.Module]:
    """The decoder layers, in order."""
    return list(loaded.model.get_submodule(loaded.layers).children())


@torch.no_grad()
def record(loaded: LoadedModel, windows: torch.Tensor, *, batch: int, folder: Path | None = None) -> Recording:
    """Run the decoder with pass-through layers. `windows` int64 `[W, T]`; `batch` windows go together.

    With a `folder`, hidden states go into mapped files there.

    Raises NonFiniteError when the embeddings give a NaN or infinity.
    """
    layers = layers_of(loaded)
    device = next(loaded.model.parameters()).device
    calls: list[list[LayerCall]] = []
    start = Streams([], torch.empty(0), folder)
    returns_tuple: bool | None = None

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            original = layer.forward

            def forward(*args: Any, _index: int = index, _original: Callable = original, **kwargs: Any) -> Any:
                nonlocal returns_tuple
                call, hidden = _split(args, kwargs)
                if returns_tuple is None:
                    with loaded.resident(_index):
                        returns_tuple = isinstance(_original(*args, **kwargs), tuple)
                if _index == 0:
                    if not hidden.isfinite().all():
                        raise NonFiniteError("The embeddings give NaN or infinity on the calibration text.")
                    if calls:
                        start.put(len(start.batches), hidden)
                    else:
                        start.probe = hidden
                    calls.append([])
                calls[-1].append(call)
                return (hidden,) if returns_tuple else hidden

            # An instance attribute shadows the class's forward, so the layer keeps its other attributes (Gemma's type).
            stack.enter_context(shadowed(layer, forward))
        decoder = loaded.model.base_model
        for ids in (windows[:1, :PROBE_TOKENS], *windows.split(batch)):
            decoder(input_ids=ids.to(device), use_cache=False)
    if len(calls) != len(windows.split(batch)) + 1 or any(len(record) != len(layers) for record in calls):
        raise InputError(f"{type(loaded.model).__name__} does not call every decoder layer once, in order.")
    return Recording(calls[1:], bool(returns_tuple), calls[0], start)


@contextmanager
def shadowed(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`layer` runs `forward` in the place of its own."""
    before = layer.__dict__.get("forward")  # accelerate, for one, puts a wrapper there
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if before is not None:
            layer.__dict__["forward"] = before


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[LayerCall, torch.Tensor]:
    if args:
        return LayerCall(args[1:], kwargs, None), args[0]
    rest = dict(kwargs)
    return LayerCall((), rest, "hidden_states"), rest.pop("hidden_states")
