"""The output metric of healing: how much the loss feels of a layer's error in every direction (method 10)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unirank.analysis.scheme.two_sided import damped
from unirank.analysis.store import AnalysisStore
from unirank.finetuning.block import in_float32
from unirank.layerwise.recording import LayerCall
from unirank.models import factoring
from unirank.types import LinearSpec

_NEAR = 1e-3  # of the change that is seen in float32


class OutputMetric:
    """Of every layer the root of the damped second moment of `∂L/∂(output)`, from the gradients of an analysis.

    The store has the moments at the outputs of linears. Where a layer adds the output of one of them to its stream and
    does no more with it, the two gradients are the same, up to a factor, and so are the moments.

    Args:
        store: with gradients, of the dense model.
        damping: of the mean diagonal, as in `Refine.metric_damping`.
    """

    def __init__(self, store: AnalysisStore, layers: str, damping: float) -> None:
        self._store, self._layers, self._damping = store, layers, damping

    @torch.no_grad()
    def of(self, layer: nn.Module, index: int, call: LayerCall, hidden: torch.Tensor) -> torch.Tensor | None:
        """`S [D, D]`, float32, on the device of `hidden`: an error `e [D]` counts `||e S||²`, the mean diagonal of
        `S Sᵀ` is 1. None where no linear's gradient is that of the layer's output (a norm behind the last one).

        Args:
            layer: of the dense model, in memory.
            call: how the model calls it.
            hidden: `[B, T, D]` that enters it.
        """
        specs = [spec for spec in self._store.linears if spec.layer == index]
        found = linear_of_the_output(layer, f"{self._layers}.{index}.", specs, call, hidden)
        if found is None:
            return None
        moment = damped(self._store.gradients(index, hidden.device)[found].g, self._damping)
        return factoring.cholesky(moment / moment.diagonal().mean()).float()


@torch.no_grad()
def linear_of_the_output(
    layer: nn.Module, prefix: str, specs: Sequence[LinearSpec], call: LayerCall, hidden: torch.Tensor
) -> str | None:
    """The name of a linear whose output, changed, changes the layer's by the same times one number; or None.

    Found by trying, in float32, and never by name; the last such linear in the order of the modules.

    Args:
        prefix: of the layer's names in `specs`.
    """
    layer = copy.deepcopy(layer).float()
    call, hidden = in_float32(call), hidden.float()
    before = call.run(layer, hidden)
    change = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    change *= before.std()

    def changed(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + change.view(output.shape)

    for spec in reversed(specs):
        if spec.m != hidden.shape[-1]:
            continue
        handle = layer.get_submodule(spec.name.removeprefix(prefix)).register_forward_hook(changed)
        try:
            seen = call.run(layer, hidden) - before
        finally:
            handle.remove()
        factor = (seen * change).sum() / change.square().sum()
        if factor != 0 and (seen - factor * change).norm() <= _NEAR * seen.norm():
            return spec.name
    return None
