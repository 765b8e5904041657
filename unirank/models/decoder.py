"""Where the text decoder is in a model that may be more: with towers for images and sound, or an encoder.

By what transformers says of it (`get_decoder`, the configurations of its parts), never by the model's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from unirank.models.configurations import text_part


def lists_of_decoder(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every ModuleList of the text decoder, by its path from `model`'s root.

    It is in what `get_decoder` gives, and in no part of a configuration of its own (a vision tower that the decoder
    holds, as in GIT and Phi-4): the innermost model of transformers around it has the text's configuration, or the
    whole one.
    """
    start, decoder = _decoder(model)
    own = _kinds(model)
    owners = {start: True}  # models of transformers, by path: whether they are the decoder, or around it
    for path, module in decoder.named_modules(prefix=start):
        if isinstance(module, PreTrainedModel) and path != start:
            owners[path] = type(module.config) in own
            continue
        around = [owner for owner in owners if owner == start or path.startswith(f"{owner}.")]
        if isinstance(module, nn.ModuleList) and owners[max(around, key=len)]:
            yield path, module


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    if isinstance(model, PreTrainedModel):
        try:
            said: Any = model.get_decoder()
        except (NotImplementedError, AttributeError):  # a class without a rule; what it inherits looks at names
            said = None
        for path, module in model.named_modules():
            # Of ModernBERT's decoder it gives the output head.
            if module is said and any(isinstance(child, nn.ModuleList) for child in module.modules()):
                return path, module
    return "", model


def _kinds(model: nn.Module) -> tuple[type, ...]:
    """The types of configuration that the decoder may have; empty for what is no model of transformers."""
    if not isinstance(model, PreTrainedModel):
        return ()
    return type(model.config), type(text_part(model.config))
