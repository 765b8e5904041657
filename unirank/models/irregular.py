"""Linears that a decoder layer does not call exactly once, so that they stay whole.

Mamba multiplies by the weight of its `dt_proj` itself; the cross attention of an encoder-decoder's decoder sleeps where
it is a language model by itself; Gemma 3n asks the router of its several streams twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unirank.errors import is_out_of_memory
from unirank.models.structure import holds_other_weights
from unirank.types import SUBLAYERS, ExpertSpec, LinearSpec, ListedSpec, sublayers_of

_TOKENS = 8


def irregular_linears(model: PreTrainedModel, layers: str, linears: Sequence[LinearSpec]) -> frozenset[str]:
    """The names of those `linears` that a few tokens on their way through the decoder do not meet exactly once.

    Only unusual layers are asked: with weights of another kind (convolutions, state-space parameters) or another number
    of sublayers than two. Else such a linear is a fault, and the trace of the layer says so; which is also left to say
    it of a layer that runs several times as a whole, and of a model that cannot be run here.

    `layers` is the path of the layers' list; those that are not in memory run with zeros for weights.
    """
    if not any(_is_unusual(layer, [s for s in linears if s.layer == i]) for i, layer in _numbered(model, layers)):
        return frozenset()
    watched = {spec.name for spec in linears if not isinstance(spec, ExpertSpec | ListedSpec)}
    called: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            called[name] += 1

        return hook

    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    decoder: Any = model.base_model
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_with_zeros(model, layers, device))
        for name in watched:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        try:
            decoder(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device=device), use_cache=False)
        except Exception as error:  # it is the model's own code, which may do anything
            if is_out_of_memory(error):
                raise
            return frozenset()  # calibration runs it again, and says what happened
    found: set[str] = set()
    for index, _ in _numbered(model, layers):
        members = {spec.name: called[spec.name] for spec in linears if spec.layer == index and spec.name in watched}
        if 1 in members.values():
            found.update(name for name, count in members.items() if count != 1)
    return frozenset(found)


def _numbered(model: nn.Module, layers: str) -> list[tuple[int, nn.Module]]:
    return list(enumerate(model.get_submodule(layers).children()))


def _is_unusual(layer: nn.Module, linears: Sequence[LinearSpec]) -> bool:
    experts = any(isinstance(spec, ExpertSpec) for spec in linears)
    return (not experts and holds_other_weights(layer)) or len(sublayers_of(linears)) != len(SUBLAYERS)


@contextmanager
def _with_zeros(model: nn.Module, layers: str, device: torch.device) -> Iterator[None]:
    """The layers whose weights are elsewhere hold zeros while they run: what they call does not depend on them."""

    def fill(layer: nn.Module, _: Any) -> None:
        for tensors, leaf, tensor in _absent(layer):
            zeros = torch.zeros_like(tensor, device=device)
            tensors[leaf] = nn.Parameter(zeros, requires_grad=False) if isinstance(tensor, nn.Parameter) else zeros

    meta = {id(layer): _absent(layer) for _, layer in _numbered(model, layers)}

    def restore(layer: nn.Module, *_: Any) -> None:
        for tensors, leaf, tensor in meta[id(layer)]:
            tensors[leaf] = tensor

    with ExitStack() as stack:
        for _, layer in _numbered(model, layers):
            stack.callback(restore, layer)  # also where its own code failed
            stack.callback(layer.register_forward_pre_hook(fill).remove)
            stack.callback(layer.register_forward_hook(restore).remove)
        yield


def _absent(layer: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    found: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in layer.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        found += [(held, leaf, one) for held in groups for leaf, one in held.items() if one is not None and one.is_meta]
    return found
