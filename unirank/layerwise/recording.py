"""A pass that records how the model calls its layers, and what enters the first one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import nn

from unirank.disk.files import mapped_copy
from unirank.errors import InputError, NonFiniteError, UnirankError, first_line, is_out_of_memory
from unirank.layerwise.dataflow import called
from unirank.queues import PageLocked
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
        """The layer's output stream `[B, T, D]`.

        Raises InputError when the layer's own code fails, or returns something else.
        """
        named = {} if self.hidden_by_name is None else {self.hidden_by_name: hidden}
        first = (hidden,) if self.hidden_by_name is None else ()
        with foreign(f"The layer {type(layer).__name__} cannot be run by itself"):
            output = layer(*first, *self.args, **named, **self.kwargs)
        output = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(output, torch.Tensor) or output.shape != hidden.shape:
            raise InputError(
                f"The layer {type(layer).__name__} must return hidden states {list(hidden.shape)} as they enter it, "
                f"got {_kind(output)}."
            )
        return output


@dataclass
class Streams:
    """Hidden states between two layers, one tensor `[B, T, D]` a batch, and those of the probe.

    With a `folder`, batches are in mapped files there, with a `host` in page-locked memory, and on the probe's device
    only while a layer runs on them.
    """

    batches: list[torch.Tensor]
    probe: torch.Tensor
    folder: Path | None = None
    host: PageLocked | None = None

    def put(self, position: int, hidden: torch.Tensor) -> None:
        """`hidden` takes the place of the batch at `position`, or is added behind the last one."""
        self.batches[position : position + 1] = [self.away(hidden)]

    def away(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` as it is kept: itself, or a copy in a mapped file or in page-locked memory."""
        if self.host is not None:
            return self.host.keep(hidden)
        return hidden if self.folder is None else mapped_copy(self.folder, hidden)

    def entering(self) -> Iterator[torch.Tensor]:
        """Each batch on the probe's device. The one that was given may be put into while the next one comes."""
        ready = self._fetch(0) if self.batches else None
        for position in range(len(self.batches)):
            assert ready is not None
            hidden = ready()
            ready = self._fetch(position + 1) if position + 1 < len(self.batches) else None
            yield hidden
            del hidden  # else it lives as long as the next one

    def at(self, position: int) -> torch.Tensor:
        """The batch at `position`, on the probe's device."""
        return self._fetch(position)()

    def _fetch(self, position: int) -> Callable[[], torch.Tensor]:
        """Begin to bring the batch at `position`; call the result for it."""
        kept = self.batches[position]
        if self.host is not None:
            return self.host.fetch(kept)
        return lambda: kept.to(self.probe.device)

    def settled(self) -> Streams:
        """The same as it is now, for another thread that reads it while this one goes on."""
        if self.host is not None:
            self.host.settle()
        return Streams(list(self.batches), self.probe)


@dataclass(frozen=True)
class Recording:
    """What the recording pass saw: `calls[batch][layer]`, the probe's calls, and the streams that enter layer 0."""

    calls: list[list[LayerCall]]
    tail: tuple[Any, ...] | None  # what follows the hidden states in a layer's tuple; None: they are returned bare
    probe_calls: list[LayerCall]
    start: Streams

    def returned(self, hidden: torch.Tensor) -> Any:
        """What a layer returns whose output stream is `hidden`."""
        return hidden if self.tail is None else (hidden, *self.tail)


def layers_of(loaded: LoadedModel) -> list[nn.Module]:
    """The decoder layers, in order."""
    return list(loaded.model.get_submodule(loaded.layers).children())


@torch.no_grad()
def record(
    loaded: LoadedModel,
    windows: torch.Tensor,
    *,
    batch: int,
    folder: Path | None = None,
    host: PageLocked | None = None,
) -> Recording:
    """Run the decoder with pass-through layers. `windows` int64 `[W, T]`; `batch` windows go together.

    Hidden states are kept where `folder` and `host` say, as in `Streams`.

    Raises:
        InputError: the model does not call its layers once and in order, or with or for something else than hidden
            states `[W, T, D]`, or its own code fails, or it changes its weights when it runs.
        NonFiniteError: the embeddings give a NaN or infinity.
    """
    layers = layers_of(loaded)
    model = type(loaded.model).__name__
    device = loaded.device
    calls: list[list[LayerCall]] = []
    start = Streams([], torch.empty(0), folder, host)
    tails: list[tuple[Any, ...] | None] = []  # one, once it is known
    handed_on: list[torch.Tensor] = []  # what it has that the layer itself made
    weights = {spec.name: spec.stored_in(loaded.model) for spec in loaded.linears}
    versions = {name: _version(weight) for name, weight in weights.items()}
    disorder = f"{model} does not call every layer of {loaded.layers} once, in order, for a batch of tokens."

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            original = layer.forward

            def forward(*args: Any, _index: int = index, _original: Callable = original, **kwargs: Any) -> Any:
                if len(calls[-1]) != _index:
                    raise InputError(disorder)
                place = f"{loaded.layers}.{_index} of {model}"
                taken = list(_tensors((args, kwargs)))
                if any(tensor is one for tensor in taken for one in handed_on):
                    raise InputError(
                        f"{place} takes more from the layer before it than hidden states; unirank runs layers by "
                        "themselves."
                    )
                call, hidden = _split(args, kwargs, place)
                if not tails:
                    with loaded.resident(_index), foreign(f"{place} cannot be run"):
                        output = _original(*args, **kwargs)
                    tails.append(_tail(output, hidden, place))
                    handed_on.extend(one for one in _tensors(tails) if not any(one is known for known in taken))
                if _index == 0:
                    if not hidden.isfinite().all():
                        raise NonFiniteError("The embeddings give NaN or infinity on the calibration text.")
                    if len(calls) == 1:
                        start.probe = hidden
                    else:
                        start.put(len(start.batches), hidden)
                calls[-1].append(call)
                return hidden if tails[0] is None else (hidden, *tails[0])

            # An instance attribute shadows the class's forward, so the layer keeps its other attributes (Gemma's type).
            stack.enter_context(shadowed(layer, forward))
        decoder = loaded.model.base_model
        for ids in (windows[:1, :PROBE_TOKENS], *windows.split(batch)):
            calls.append([])
            with foreign(f"{model} cannot be run over token ids with layers that pass hidden states on"):
                decoder(input_ids=ids.to(device), use_cache=False)
            if len(calls[-1]) != len(layers):
                raise InputError(disorder)
            entered = start.batches[-1] if start.batches else start.probe
            if len(ids) not in _window_sizes(entered):
                raise InputError(
                    f"{model} must hand its layers hidden states [windows, tokens, D], got {_kind(entered)}."
                )
    for name, weight in weights.items():
        if _version(weight) != versions[name]:  # RWKV divides some by powers of two
            raise InputError(
                f"{model} changes {name}.weight when it runs; unirank needs weights that stay as they are."
            )
    return Recording(calls[1:], tails[0], calls[0], start)


def _window_sizes(hidden: torch.Tensor) -> tuple[int, ...]:
    """Where the number of windows may stand: first, or second where a layer carries several streams at once.

    Gemma 3n has them in front, `[4, B, T, D]`, DeepSeek V4 behind, `[B, T, 4, D]`.
    """
    return tuple(hidden.shape[: hidden.dim() - 2])


def _version(weight: Any) -> int:
    """How often the tensor was written to; torch does not count in inference mode."""
    return 0 if weight.is_inference() else weight._version


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Around code of a model's own: whatever it raises is an InputError that begins with `what`.

    Errors of ours pass, those of our hooks inside the model too, and so do those of memory.
    """
    try:
        yield
    except UnirankError:
        raise
    except Exception as error:  # it is anybody's code, so it may be anything
        if is_out_of_memory(error) or _is_of_a_hook(error):
            raise
        raise InputError(f"{what}: {type(error).__name__}: {first_line(error)}.") from error


def _is_of_a_hook(error: Exception) -> bool:
    """Whether the model had called back into unirank when it happened: then it is a slip of ours, and must be seen."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    ours = [frame.f_globals.get("__name__", "").startswith("unirank.") for frame in frames]
    for place, frame in enumerate(frames):
        if frame.f_code is called.__code__:  # torch's function, called by the model and only watched by us
            ours[place - 1 : place + 1] = [False, False]
    return any(itertools.dropwhile(bool, ours))


@contextmanager
def shadowed(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`layer` runs `forward` instead of its own."""
    before = layer.__dict__.get("forward")  # accelerate, for one, puts a wrapper there
    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if before is not None:
            layer.__dict__["forward"] = before


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], place: str) -> tuple[LayerCall, torch.Tensor]:
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states", None)
    if not isinstance(hidden, torch.Tensor) or hidden.dim() not in (3, 4) or not hidden.is_floating_point():
        raise InputError(f"{place} must take hidden states [windows, tokens, D] first, got {_kind(hidden)}.")
    return LayerCall(args[1:], rest, None if args else "hidden_states"), hidden


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _tail(output: Any, hidden: torch.Tensor, place: str) -> tuple[Any, ...] | None:
    """What follows the hidden states in a layer's output; None where they are the output."""
    values = output if type(output) in (tuple, list) else [output]
    if not values or not isinstance(values[0], torch.Tensor) or values[0].shape != hidden.shape:
        raise InputError(f"{place} must return hidden states {list(hidden.shape)}, got {_kind(output)}.")
    if values is not output:
        return None
    # Other values (attention weights, a state) belong to this one run. They stand where the model expects them, and no
    # layer may get them.
    return tuple(values[1:])


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"
