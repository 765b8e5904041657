"""Linears that a decoder layer does not call exactly once, so that they stay whole.

Mamba multiplies by the weight of its `dt_proj` itself; the cross attention of an encoder-decoder's decoder sleeps where
it is a language model by itself; Gemma 3n asks the router of its several streams twice.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unirank.models.structure import holds_other_weights
from unirank.types import SUBLAYERS, ExpertSpec, LinearSpec, sublayers_of

_TOKENS = 8


def irregular_linears(
    model: PreTrainedModel, layers: str, linears: Sequence[LinearSpec], *, paged: bool
) -> frozenset[str]:
    """The names of those `linears` that a few tokens on their way through the decoder do not meet exactly once.

    Only unusual layers are asked: with weights of another kind (convolutions, state-space parameters) or another number
    of sublayers than two. Else such a linear is a fault, and the trace of the layer says so; which is also left to say
    it of a layer that runs several times as a whole, and of a model that cannot be run here.

    Args:
        layers: path of the layers' list.
        paged: the layers are not in memory; then a copy of the model without weights runs.
    """
    if not any(_is_unusual(layer, [s for s in linears if s.layer == i]) for i, layer in _numbered(model, layers)):
        return frozenset()
    watched = {spec.name for spec in linears if not isinstance(spec, ExpertSpec)}
    called: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            called[name] += 1

        return hook

    device = torch.device("meta") if paged else next(model.parameters()).device
    with torch.no_grad():
        try:
            running = _bare(model) if paged else model
            handles = [running.get_submodule(name).register_forward_hook(note(name)) for name in watched]
            try:
                decoder: Any = running.base_model
                decoder(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device=device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
        except Exception:  # it is the model's own code, which may do anything; calibration runs it again and says what
            return frozenset()
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


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).eval()
