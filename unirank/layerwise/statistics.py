"""Calibration, layer by layer: moments of every distinct input and cosines of every sublayer, in one pass.

A recording pass runs the model with its decoder layers turned into pass-throughs that note each layer's own arguments
(masks, position embeddings; they differ by layer in Gemma 3) and the first hidden states. Then each layer runs over
all batches, with hooks that accumulate, and its outputs are the next layer's inputs. `lm_head` never runs. Peak memory
is the model, one layer's statistics and the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from unirank import ops
from unirank.distributed import sum_in_order
from unirank.errors import NonFiniteError
from unirank.layerwise.clipping import clipped
from unirank.layerwise.expert_moments import ROOM, ExpertMoments, parts_of
from unirank.layerwise.hooks import Hook, reading
from unirank.layerwise.listed_moments import ListedMoments
from unirank.layerwise.recording import Recording, Streams
from unirank.layerwise.shrinkage import shrink_all
from unirank.layerwise.trace import Place, TracedLayer, traced_layer
from unirank.types import BLOCK, CosineStat, ExpertSpec, LayerStats, ListedSpec, LoadedModel, Moment


@torch.no_grad()
def calibrate_layer(
    loaded: LoadedModel,
    index: int,
    recording: Recording,
    streams: Streams,
    *,
    moments: bool = True,
    mean_abs: bool = False,
    clip: float = 0.0,
    shrink: float = 0.0,
) -> LayerStats:
    """Run layer `index` over all batches; `streams` moves on in place to what enters the next layer.

    Args:
        moments: accumulate input moments; schemes that look at weights only need none.
        mean_abs: accumulate the mean absolute input too.
        clip: no input token counts in a moment with more than this many times the median length; 0 is off.
        shrink: how far the moments are drawn towards their diagonals (see `unirank.layerwise.shrinkage`); 0 is off.

    Raises:
        NonFiniteError: an input, an output or a statistic is NaN or infinity; names the linear or the layer.
        InputError: the layer's structure is not understood (see `trace_layer`).
    """
    options: dict[str, Any] = {"moments": moments, "mean_abs": mean_abs, "clip": clip, "shrink": shrink}
    (stats,) = calibrate_parts(loaded, index, recording, streams, room=None, **options)
    return stats


@torch.no_grad()
def calibrate_parts(
    loaded: LoadedModel,
    index: int,
    recording: Recording,
    streams: Streams,
    *,
    moments: bool = True,
    mean_abs: bool = False,
    clip: float = 0.0,
    shrink: float = 0.0,
    room: int | None = ROOM,
) -> Iterator[LayerStats]:
    """`calibrate_layer` in parts: where the moments of the layer's experts take more than `room` bytes, some at a time.

    Each part but the first runs the layer over all batches once more. `input_of` of a part names what it has moments
    of. Without experts there is one part. `streams` has moved on when the last part is there.
    """
    layer, probe = traced_layer(loaded, index, recording, streams.probe)
    grams = _Grams(layer, enabled=moments, mean_abs=mean_abs, clip=clip)
    cosines = _Cosines(layer, device=streams.probe.device)
    stacked = [spec for spec in layer.specs if isinstance(spec, ExpertSpec)]
    listed = ListedMoments(layer.module, layer.prefix, layer.specs, enabled=moments, mean_abs=mean_abs, clip=clip)
    experts = ExpertMoments(layer.module, layer.prefix, stacked, mean_abs=mean_abs, clip=clip)
    groups = parts_of(stacked, room) if moments and stacked else [stacked]
    found, inputs, shown, shares = {}, {}, {}, {}
    for number, group in enumerate(groups):
        first, last = number == 0, number == len(groups) - 1
        with ExitStack() as stack:
            stack.enter_context(experts.hooked(group if moments else ()))
            if first:
                stack.enter_context(grams.hooked())
                stack.enter_context(listed.hooked())
                stack.enter_context(cosines.hooked())
            for position, hidden in enumerate(streams.entering()):
                output = recording.calls[position][index].run(layer.module, hidden)
                if first:
                    cosines.add(hidden, output)
                if last:
                    streams.put(position, output)
        input_of = {spec.name: spec.name for spec in group}
        if first:
            found, shown, shares = grams.finish(), cosines.finish(), experts.shares() | listed.shares()
            found |= listed.finish()
            readers = layer.trace.input_of
            inputs = {spec.module: found[readers[spec.module]] for spec in stacked} if moments else {}
            input_of |= {name: owner for name, owner in readers.items() if name not in inputs}
        if last:
            streams.probe = probe
        if moments:
            found |= experts.finish(group, inputs)
        yield LayerStats(index, shrink_all(found, shrink), input_of, shown, shares)
        found = {}


class _Grams:
    """One running Gram matrix per distinct input of the layer's linears."""

    def __init__(self, layer: TracedLayer, *, enabled: bool, mean_abs: bool, clip: float) -> None:
        own = {spec.name for spec in layer.specs if isinstance(spec, ListedSpec)}
        self._owners = sorted(set(layer.trace.input_of.values()) - own) if enabled else []
        self._modules = {name: layer.module.get_submodule(layer.path_of(name)) for name in self._owners}
        self._clip = clip
        self._gram: dict[str, torch.Tensor] = {}
        self._sum: dict[str, torch.Tensor] = {}
        self._abs: dict[str, torch.Tensor] | None = {} if mean_abs else None
        self._tokens: dict[str, int] = dict.fromkeys(self._owners, 0)

    def hooked(self) -> AbstractContextManager[None]:
        return reading(self._modules, self._hook)

    def _hook(self, name: str) -> Hook:
        def accumulate(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = clipped(args[0].reshape(-1, args[0].shape[-1]), self._clip)
            if name not in self._gram:
                # float64 sums: SmolLM2's outlier channels span 8 decades of energy (docs/numerics.md).
                self._gram[name] = x.new_zeros((x.shape[1], x.shape[1]), dtype=torch.float64)
                self._sum[name] = x.new_zeros((x.shape[1],), dtype=torch.float64)
            ops.gram_accumulate_(self._gram[name], self._sum[name], x)
            if self._abs is not None:
                self._abs[name] = self._abs.get(name, 0) + x.abs().sum(0, dtype=torch.float64)
            self._tokens[name] += x.shape[0]

        return accumulate

    def finish(self) -> dict[str, Moment]:
        moments = {}
        for name in self._owners:
            gram, total = sum_in_order(self._gram.pop(name)), sum_in_order(self._sum.pop(name))
            tokens = int(sum_in_order(torch.tensor([self._tokens[name]])))
            if not (gram.diagonal().isfinite().all() and total.isfinite().all()):
                raise NonFiniteError(f"The input of {name} is NaN or infinity on the calibration text.")
            mean_abs = sum_in_order(self._abs.pop(name)) / tokens if self._abs is not None else None
            moments[name] = Moment(gram.div_(tokens), total.div_(tokens), tokens, mean_abs)
        return moments


class SublayerStreams:
    """The streams that enter and leave each sublayer and the whole block, caught while the layer runs."""

    def __init__(self, layer: TracedLayer) -> None:
        self._layer, self._spans = layer.module, layer.trace.spans
        self._seen: dict[Place, torch.Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        places = {place for span in self._spans.values() for place in (span.start, span.end, span.branch) if place}
        with ExitStack() as stack:
            for place in places:
                module = self._layer.get_submodule(place.module)
                if place.side == "input":
                    stack.callback(module.register_forward_pre_hook(self._catch_input(place)).remove)
                else:
                    stack.callback(module.register_forward_hook(self._catch_output(place)).remove)
            yield

    def _catch_input(self, place: Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._keep(place, args[0])

        return hook

    def _catch_output(self, place: Place) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._keep(place, output[0] if isinstance(output, tuple | list) else output)

        return hook

    def _keep(self, place: Place, tensor: torch.Tensor) -> None:
        self._seen[place] = tensor.clone() if place.overwritten else tensor

    def pairs(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The streams in and out by key, after the block ran from `x` to `y`, all `[B, T, D]`.

        They are in the model's dtype, but for sublayers in parallel: at least float32.
        """
        found = {BLOCK: (x, y)}
        for key, span in self._spans.items():
            start = x if span.start is None else self._seen[span.start]
            if span.branch is None:
                found[key] = (start, y if span.end is None else self._seen[span.end])
                continue
            # The model never makes these sums, so its dtype must not round them.
            start = start.to(torch.promote_types(start.dtype, torch.float32))
            found[key] = (start, start + self._seen[span.branch].view_as(start))
        self._seen.clear()
        return found


class _Cosines:
    """Cosines between the streams that enter and leave each sublayer, and the whole block."""

    def __init__(self, layer: TracedLayer, device: torch.device) -> None:
        self._prefix, self._streams = layer.prefix, SublayerStreams(layer)
        self._state = {key: torch.zeros(3, dtype=torch.float64, device=device) for key in (*layer.trace.spans, BLOCK)}
        self.hooked = self._streams.hooked

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Account for one batch: `x` entered the block, `y` left it, both `[B, T, D]`."""
        for key, (a, b) in self._streams.pairs(x, y).items():
            ops.cosine_accumulate_(self._state[key], a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))

    def finish(self) -> dict[str, CosineStat]:
        stats = {}
        for key, state in self._state.items():
            total, squares, tokens = sum_in_order(state).tolist()
            if not math.isfinite(total):
                raise NonFiniteError(f"The {key} output of {self._prefix} is NaN or infinity on the calibration text.")
            stats[key] = CosineStat(total, squares, int(tokens))
        return stats
