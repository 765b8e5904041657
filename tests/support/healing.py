"""What tests of healing share."""

from __future__ import annotations

from typing import Any

import torch

import unirank
from unirank.compression.checkpoint import CompressedModel
from unirank.types import LoadedModel

QUICK = unirank.Heal(passes=2, batch=4)
DISTILL = unirank.Heal(passes=1, batch=4, patience=0, distill_steps=12, distill_lr=3e-3)


class Killed(BaseException):
    """Ends a run where a test wants it; nothing catches it."""


def weights(compressed: CompressedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in compressed.model.state_dict().items()}


def layers(healed: CompressedModel) -> list[dict[str, Any]]:
    assert healed.training is not None
    return healed.training["layers"]


def stream_error(dense: LoadedModel, compressed: CompressedModel, windows: torch.Tensor) -> float:
    """Mean over tokens of the squared relative error of what leaves the last layer, when both models run whole."""
    seen = []
    for model in (dense.model, compressed.model):
        last = list(model.get_submodule(dense.layers).children())[-1]

        def catch(_module: Any, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = last.register_forward_hook(catch)
        with torch.no_grad():
            model(input_ids=windows, use_cache=False)
        handle.remove()
    x, own = (hidden.double() for hidden in seen)
    return float(((x - own).square().sum(-1) / x.square().sum(-1)).mean())
