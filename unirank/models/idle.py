"""Linears that a decoder layer holds and does not call, so that they stay whole.

Mamba multiplies by the weight of its `dt_proj` itself; the cross attention of an encoder-decoder's decoder sleeps where
it is a language model by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unirank.models.structure import holds_other_weights
from unirank.types import SUBLAYERS, ExpertSpec, LinearSpec, sublayers_of

_TOKENS = 8


def idle_linears(
    model: PreTrainedModel, layers: str, linears: Sequence[LinearSpec], *, paged: bool
) -> frozenset[str]:
    """The names of those `linears` that stay idle while a few tokens run through the decoder.

    Only unusual layers are asked: with weights of another kind (convolutions, state-space parameters) or another number
    of sublayers than two. Else an idle linear is a fault, and the trace of the layer says so. A model that cannot be
    run here is left to it too.

    Args:
        layers: path of the layers' list.
        paged: the layers are not in memory; then a copy of the model without weights runs.
    """
    if not any(_is_unusual(layer, [s for s in linears if s.layer == i]) for i, layer in _numbered(model, layers)):
        return frozenset()
    watched = {spec.name for spec in linears if not isinstance(spec, ExpertSpec)}
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            called.add(name)

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
    return frozenset(watched - called) if called else frozenset()


def _numbered(model: nn.Module, layers: str) -> list[tuple[int, nn.Module]]:
    return list(enumerate(model.get_submodule(layers).children()))


def _is_unusual(layer: nn.Module, linears: Sequence[LinearSpec]) -> bool:
    experts = any(isinstance(spec, ExpertSpec) for spec in linears)
    return (not experts and holds_other_weights(layer)) or len(sublayers_of(linears)) != len(SUBLAYERS)


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).eval()
