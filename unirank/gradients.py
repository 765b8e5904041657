"""Gradients at the output of every linear: one backward pass, layer by layer, whose memory is one layer's.

Forward: every layer's input goes to a file. Backward: the head gives the loss and its gradient at the last hidden state;
then, from the last layer to the first, a layer runs again on its inputs with gradients on, and what arrives at its
input is the next one's. Every file appears whole, so a killed pass resumes at the first layer without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unirank import ops
from unirank.calibrate import Recording, Streams, layers_of, record, shadowed
from unirank.errors import NonFiniteError
from unirank.progress import OnProgress, silent
from unirank.store import AnalysisStore
from unirank.types import Gradient, LoadedModel

_STAGE = "gradients"


def gradient_pass(
    loaded: LoadedModel, windows: torch.Tensor, store: AnalysisStore, *, batch: int, progress: OnProgress = silent
) -> None:
    """Write the gradients of every layer to `store`, resuming what is there. `windows` int64 `[W, T]`.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinity; names the window or the linear.
        WriteError: the disk refused; finished layers stay.
    """
    count = store.layer_count
    steps = 2 * count
    remaining = store.layers_without_gradients()
    progress(_STAGE, steps - remaining, steps)
    if remaining == 0:
        return
    with _frozen(loaded.model):
        recording = record(loaded, windows, batch=batch)
        if not store.has_scratch("backward", remaining):
            remaining = count  # not started, or what a killed run needs was deleted since
            _forward(loaded, windows.split(batch), recording, store, progress)
        for layer in reversed(range(remaining)):
            inputs = store.read_scratch("forward", layer, recording.start.probe.device)
            outputs = store.read_scratch("backward", layer + 1, recording.start.probe.device)
            gradients, arriving = backward_layer(loaded, layer, recording, inputs, outputs)
            store.write_scratch("backward", layer, arriving)
            store.write_gradients(layer, gradients)
            store.remove_scratch("backward", layer + 1)
            store.remove_scratch("forward", layer)
            progress(_STAGE, steps - layer, steps)
    store.remove_scratch("backward", 0)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no gradients meanwhile, so that autograd keeps nothing for them."""
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


def _forward(
    loaded: LoadedModel,
    windows: Sequence[torch.Tensor],
    recording: Recording,
    store: AnalysisStore,
    progress: OnProgress,
) -> None:
    count = store.layer_count
    first = next(i for i in range(count + 1) if not store.has_scratch("forward", i + 1))
    batches = recording.start.batches
    if first:
        batches = store.read_scratch("forward", first, recording.start.probe.device)
    else:
        store.write_scratch("forward", 0, batches)
    layers = layers_of(loaded)
    for index in range(first, count):
        with torch.no_grad():
            batches = [calls[index].run(layers[index], x) for calls, x in zip(recording.calls, batches, strict=True)]
        store.write_scratch("forward", index + 1, batches)
        progress(_STAGE, index + 1, 2 * count)
    gradients = []
    for position, (ids, hidden) in enumerate(zip(windows, batches, strict=True)):
        # One window at a time: its logits are as wide as the vocabulary.
        parts = [
            head_gradient(loaded, recording, i[None], h[None], position) for i, h in zip(ids, hidden, strict=True)
        ]
        gradients.append(torch.cat(parts))
    store.write_scratch("backward", count, gradients)
    store.remove_scratch("forward", count)


def head_gradient(
    loaded: LoadedModel, recording: Recording, ids: torch.Tensor, hidden: torch.Tensor, position: int
) -> torch.Tensor:
    """Gradient `[1, T, D]` of the summed NLL of `ids` at `hidden`, what leaves the last decoder layer.

    Raises NonFiniteError when the loss is NaN or infinity.
    """
    leaf = hidden.detach().requires_grad_()
    output = (leaf,) if recording.returns_tuple else leaf

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output

    ids = ids.to(hidden.device)
    with ExitStack() as stack, torch.enable_grad():
        for layer in layers_of(loaded):
            stack.enter_context(shadowed(layer, forward))
        logits = loaded.model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        if not bool(loss.isfinite()):
            raise NonFiniteError(f"The loss of calibration batch {position} is NaN or infinity.")
        return torch.autograd.grad(loss, leaf)[0]


def backward_layer(
    loaded: LoadedModel,
    index: int,
    recording: Recording,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
) -> tuple[dict[str, Gradient], list[torch.Tensor]]:
    """Gradients of the linears of layer `index`, and the gradients `[B, T, D]` of each batch at its input.

    Args:
        inputs: what entered the layer.
        outputs: the gradients at what left it.
    """
    layer = layers_of(loaded)[index]
    sums = {
        spec.name: _Sums(layer.get_submodule(spec.kind), spec.m) for spec in loaded.linears if spec.layer == index
    }
    arriving = []
    with ExitStack() as stack:
        for total in sums.values():
            stack.callback(total.module.register_forward_hook(total.watch).remove)
        for calls, x, gradient in zip(recording.calls, inputs, outputs, strict=True):
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                output = calls[index].run(layer, leaf)
            arriving.append(torch.autograd.grad(output, leaf, gradient)[0])
    return {name: total.finish(name) for name, total in sums.items()}, arriving


class _Sums:
    """Running sums of one linear's gradients."""

    def __init__(self, module: nn.Module, m: int) -> None:
        self.module = module
        self._m = m
        self._g: torch.Tensor | None = None
        self._windows = self._tokens = 0

    def watch(self, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        output.register_hook(self._adder(args[0].detach()))

    def _adder(self, x: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(g: torch.Tensor) -> None:
            if self._g is None:
                self._g = g.new_zeros((self._m, self._m), dtype=torch.float64)
                self._mean = g.new_zeros((self._m,), dtype=torch.float64)
                self._rows = g.new_zeros((self._m,), dtype=torch.float64)
                self._weight = g.new_zeros((self._m, x.shape[-1]), dtype=torch.float64)
            ops.gram_accumulate_(self._g, self._mean, g.reshape(-1, self._m))
            for g_window, x_window in zip(g, x.view(g.shape[0], -1, x.shape[-1]), strict=True):
                weight = (g_window.T @ x_window).double()
                self._weight += weight
                self._rows += weight.square().sum(1)
            self._windows += g.shape[0]
            self._tokens += g.shape[0] * g.shape[1]

        return add

    def finish(self, name: str) -> Gradient:
        if self._g is None or not (self._g.diagonal().isfinite().all() and self._weight.isfinite().all()):
            raise NonFiniteError(f"The gradient at {name} is NaN or infinity on the calibration text.")
        return Gradient(self._g / self._tokens, self._rows / self._windows, self._weight / self._tokens)
