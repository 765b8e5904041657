"""Calibration, layer by layer: moments of every distinct input and cosines of every sublayer, in one pass.

A recording pass runs the model with its decoder layers turned into pass-throughs that note each layer's own arguments
(masks, position embeddings; they differ by layer in Gemma 3) and the first hidden states. Then each layer runs over
all batches, with hooks that accumulate, and its outputs are the next layer's inputs. `lm_head` never runs. Peak memory
is the model, one layer's statistics and the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from unirank import ops
from unirank.distributed import sum_in_order
from unirank.errors import NonFiniteError
from unirank.layerwise.clipping import clipped
from unirank.layerwise.recording import Recording, Streams
from unirank.layerwise.trace import TracedLayer, traced_layer
from unirank.types import CosineStat, LayerStats, LoadedModel, Moment


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
) -> LayerStats:
    """Run layer `index` over all batches; `streams` moves on in place to what enters the next layer.

    Args:
        moments: accumulate input moments; schemes that look at weights only need none.
        mean_abs: accumulate the mean absolute input too.
        clip: no input token counts in a moment with more than this many times the median length; 0 is off.

    Raises:
        NonFiniteError: an input, an output or a statistic is NaN or infinity; names the linear or the layer.
        InputError: the layer's structure is not understood (see `trace_layer`).
    """
    layer, streams.probe = traced_layer(loaded, index, recording, streams.probe)
    grams = _Grams(layer, enabled=moments, mean_abs=mean_abs, clip=clip)
    cosines = _Cosines(layer, device=streams.probe.device)
    with grams.hooked(), cosines.hooked():
        for position, hidden in enumerate(streams.entering()):
            output = recording.calls[position][index].run(layer.module, hidden)
            cosines.add(hidden, output)
            streams.put(position, output)
    return LayerStats(index, grams.finish(), layer.trace.input_of, cosines.finish())


class _Grams:
    """One running Gram matrix per distinct input of the layer's linears."""

    def __init__(self, layer: TracedLayer, *, enabled: bool, mean_abs: bool, clip: float) -> None:
        self._owners = sorted(set(layer.trace.input_of.values())) if enabled else []
        self._modules = {name: layer.module.get_submodule(layer.path_of(name)) for name in self._owners}
        self._clip = clip
        self._gram: dict[str, torch.Tensor] = {}
        self._sum: dict[str, torch.Tensor] = {}
        self._abs: dict[str, torch.Tensor] | None = {} if mean_abs else None
        self._tokens: dict[str, int] = dict.fromkeys(self._owners, 0)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_pre_hook(self._hook(name)).remove)
            yield

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
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
        self._layer, self._trace = layer.module, layer.trace
        self._seen: dict[str, torch.Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        trace = self._trace
        with ExitStack() as stack:
            if trace.middle is not None:
                module = self._layer.get_submodule(trace.middle)
                stack.callback(module.register_forward_pre_hook(self._catch_input("middle")).remove)
            else:
                for key, name in trace.last_linear.items():
                    module = self._layer.get_submodule(name)
                    stack.callback(module.register_forward_hook(self._catch_output(key)).remove)
            yield

    def _catch_input(self, key: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen[key] = args[0]

        return hook

    def _catch_output(self, key: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._seen[key] = output

        return hook

    def pairs(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The streams in and out by key, after the block ran from `x` to `y`, all `[B, T, D]`.

        They are in the model's dtype, but for the sublayers of parallel blocks: at least float32.
        """
        pairs = {"block": (x, y)}
        if self._trace.middle is not None:
            middle = self._seen.pop("middle")
            return pairs | {"attention": (x, middle), "mlp": (middle, y)}
        # Parallel sublayers both start from x. The model never makes these sums, so its dtype must not round them.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return pairs | {key: (x, x + self._seen.pop(key).view_as(x)) for key in self._trace.last_linear}


class _Cosines:
    """Cosines between the streams that enter and leave each sublayer, and the whole block."""

    def __init__(self, layer: TracedLayer, device: torch.device) -> None:
        self._prefix, self._streams = layer.prefix, SublayerStreams(layer)
        self._state = {key: torch.zeros(3, dtype=torch.float64, device=device) for key in ("attention", "mlp", "block")}
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
