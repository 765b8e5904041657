"""Linears that a layer holds and does not call: Mamba multiplies by the weight of its `dt_proj` itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from unirank.models.structure import holds_other_weights
from unirank.types import ExpertSpec, LinearSpec

_TOKENS = 8


def without_idle(
    model: PreTrainedModel, layers: str, linears: Sequence[LinearSpec], *, paged: bool
) -> tuple[LinearSpec, ...]:
    """`linears` without those that stay idle while a few tokens run through the decoder; they are kept whole.

    Only layers with weights of another kind are asked (convolutions, state-space parameters): where there are none, an
    idle linear is a fault, and the trace of the layer says so. A model that cannot be run here is left to it too.

    Args:
        layers: path of the layers' list.
        paged: the layers are not in memory; then a copy of the model without weights runs.
    """
    if not any(holds_other_weights(layer) for layer in model.get_submodule(layers).children()):
        return tuple(linears)
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            called.add(name)

        return hook

    device = torch.device("meta") if paged else next(model.parameters()).device
    with torch.no_grad():
        try:
            running = model if not paged else _bare(model)
            plain = [spec.name for spec in linears if not isinstance(spec, ExpertSpec)]
            handles = [running.get_submodule(name).register_forward_hook(note(name)) for name in plain]
            try:
                decoder: Any = running.base_model
                decoder(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device=device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
        except Exception:  # it is the model's own code, which may do anything; calibration runs it again and says what
            return tuple(linears)
    return tuple(spec for spec in linears if spec.name in called or isinstance(spec, ExpertSpec))


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).eval()
