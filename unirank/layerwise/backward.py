"""Gradients at the output of every linear: one backward pass, layer by layer, whose memory is one layer's.

Forward: every layer's input goes to a file. Backward: the head gives the loss and its gradient at the last hidden
state; then, from the last layer to the first, a layer runs again on its inputs with gradients on, and what arrives at
its input is the next one's. Every file appears whole, so a killed pass resumes at the first layer without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from unirank import ops
from unirank.errors import InputError, NonFiniteError
from unirank.layerwise.head import head_logits
from unirank.layerwise.products import add_cross_moment_
from unirank.layerwise.recording import Recording, layers_of
from unirank.types import Gradient, LoadedModel

# Most probabilities may be next to nothing, and a matrix product is 60 times slower where its numbers, or their
# products with weights, are subnormal (below 1.2e-38). Below this bound a gradient is 0 instead: it is less than 1e-22
# of what its token adds, for that has an entry of `p - 1` at the target, which in float32 is 0 or at least 6e-8.
_TINY = 1e-30


def head_gradient(
    loaded: LoadedModel, recording: Recording, ids: torch.Tensor, hidden: torch.Tensor, position: int
) -> torch.Tensor:
    """Gradient `[1, T, D]` of the summed NLL of `ids [1, T]` at `hidden [1, T, D]`, what leaves the last decoder layer.

    Raises NonFiniteError when the loss is NaN or infinity; names the window, which is the `position`-th.
    """
    leaf = hidden.detach().requires_grad_()
    ids = ids.to(hidden.device)
    with torch.enable_grad():
        logits = head_logits(loaded, recording, ids, leaf)
    return torch.autograd.grad(logits, leaf, _at_logits(logits.detach(), ids, position))[0]


def _at_logits(logits: torch.Tensor, ids: torch.Tensor, position: int) -> torch.Tensor:
    """Gradient of the summed NLL at `logits [1, T, vocabulary]`: `softmax - 1` at the next token, `softmax` elsewhere.

    Written out, for autograd goes over all logits three times as often, and they are most of what the head costs.
    """
    targets = ids[:, 1:, None]
    gradient = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # A row's softmax is NaN as a whole where a logit is NaN or +infinity; at -infinity a target's loss is infinite.
    if not bool(gradient[:, :-1, 0].isfinite().all() and logits[:, :-1].gather(-1, targets).isfinite().all()):
        raise NonFiniteError(f"The loss of calibration window {position} is NaN or infinity.")
    torch.threshold_(gradient, _TINY, 0.0)
    gradient[:, :-1].scatter_add_(-1, targets, gradient.new_full((), -1.0).expand(targets.shape))
    gradient[:, -1] = 0  # the last token predicts nothing
    return gradient.to(logits.dtype)


def backward_layer(
    loaded: LoadedModel,
    index: int,
    recording: Recording,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    *,
    sums: bool = True,
) -> tuple[dict[str, Gradient], list[torch.Tensor]]:
    """Gradients of the linears of layer `index`, and the gradients `[B, T, D]` of each batch at its input.

    Args:
        inputs: what entered the layer.
        outputs: the gradients at what left it.
        sums: make the gradients of the linears; else there are none, and the layer is only passed.
    """
    layer = layers_of(loaded)[index]
    device = inputs[0].device
    totals = {
        spec.name: _Sums(layer.get_submodule(spec.kind), spec.m, spec.n, device)
        for spec in loaded.linears
        if sums and spec.layer == index
    }
    arriving = []
    with ExitStack() as stack:
        for total in totals.values():
            stack.callback(total.module.register_forward_hook(total.watch).remove)
        for calls, x, gradient in zip(recording.calls, inputs, outputs, strict=True):
            leaf = x.detach().requires_grad_()
            for total in totals.values():
                total.windows = len(x)
            with torch.enable_grad():
                output = calls[index].run(layer, leaf)
            arriving.append(torch.autograd.grad(output, leaf, gradient)[0])
    return {name: total.finish(name) for name, total in totals.items()}, arriving


class _Sums:
    """Running sums of one linear's gradients."""

    def __init__(self, module: nn.Module, m: int, n: int, device: torch.device) -> None:
        self.module = module
        self.windows = 0  # of the batch that runs; some linears see its tokens in one row (OPT)
        self._m = m
        self._g, self._sum, self._rows, self._weight = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((m, m), (m,), (m,), (m, n))
        )
        self._windows = self._tokens = 0

    def watch(self, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        output.register_hook(self._adder(args[0].detach()))

    def _adder(self, x: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def add(g: torch.Tensor) -> None:
            flat = g.reshape(-1, self._m)
            ops.gram_accumulate_(self._g, self._sum, flat)
            by_window = flat.view(self.windows, -1, self._m), x.reshape(self.windows, -1, x.shape[-1])
            for g_window, x_window in zip(*by_window, strict=True):
                add_cross_moment_(self._weight, g_window, x_window, squares=self._rows)
            self._windows += self.windows
            self._tokens += len(flat)

        return add

    def finish(self, name: str) -> Gradient:
        if self._tokens == 0:
            raise InputError(f"No gradient reaches the output of {name}, so a scheme that needs one cannot be used.")
        if not all(bool(bound.isfinite()) for bound in (*self._g.diagonal().aminmax(), *self._weight.aminmax())):
            raise NonFiniteError(f"The gradient at {name} is NaN or infinity on the calibration text.")
        return Gradient(self._g.div_(self._tokens), self._rows / self._windows, self._weight.div_(self._tokens))
