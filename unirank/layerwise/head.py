"""What stands behind the decoder layers, run alone: the last norm and `lm_head`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from unirank.layerwise.recording import Recording, layers_of, shadowed
from unirank.types import LoadedModel


def head_logits(loaded: LoadedModel, recording: Recording, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, vocabulary]` from `hidden [B, T, D]`, what leaves the last decoder layer.

    The model runs with every decoder layer turned into one that returns `hidden`; gradients flow to it where they are
    on. `ids`, int64 `[B, T]`, go through the embeddings, and nothing comes of that.
    """
    output = recording.returned(hidden)

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output

    with ExitStack() as stack:
        for layer in layers_of(loaded):
            stack.enter_context(shadowed(layer, forward))
        return loaded.model(input_ids=ids.to(hidden.device), use_cache=False).logits
