"""The input embeddings of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unirank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for. Raises InputError where it has no matrix of embeddings."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):  # transformers' default looks for modules of several names
        weight = None
    if weight is None or weight.dim() != 2:
        raise InputError(f"{type(model).__name__} has no matrix of token embeddings, so it is not understood.")
    return int(weight.shape[0])
