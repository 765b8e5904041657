"""One product for the down-projections that read the same input (q, k and v; gate and up), for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from unirank.errors import InputError
from unirank.models.low_rank import LowRankLinear, SharedInput
from unirank.models.quantizing import refuse_quantized
from unirank.models.structure import require_plain
from unirank.models.wrappers import runnable


@torch.no_grad()
def fuse(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Compute down-projections that share an input in one product, in place; returns the groups, by name.

    For inference: under gradients, `torch.compile` or adapters on a `right`, and after the model was moved or cast,
    each layer computes its own product as before. Which layers share an input is seen in a run of two tokens. The
    weights become rows of one matrix, with the same names and values; logits change by rounding only.

    Raises InputError when the model is not compressed, or a part of it is not in memory.
    """
    model = runnable(model)
    require_plain(model, "fused")
    refuse_quantized(model, "fused")
    names = {module: name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not names:
        raise InputError("The model has no low-rank layers, so there is nothing to fuse; compress it first.")
    for module, name in names.items():
        if module.right.weight.is_meta:
            raise InputError(f"The weights of {name} are not in memory; load the whole model before it is fused.")
        unfuse_layer(module)
    calls: list[tuple[LowRankLinear, torch.Tensor]] = []  # holds the tensors, so that no two have one identity

    def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, LowRankLinear)
        calls.append((module, arguments[0]))

    hooks = [module.register_forward_pre_hook(seen) for module in names]
    embedding: Any = model.get_input_embeddings()
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=embedding.weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[int, list[LowRankLinear]] = {}
    counts: dict[LowRankLinear, int] = {}
    for module, x in calls:
        groups.setdefault(id(x), []).append(module)
        counts[module] = counts.get(module, 0) + 1
    found = []
    for members in groups.values():
        alike = len({(m.right.weight.dtype, m.right.weight.device) for m in members}) == 1
        if len(members) > 1 and alike and all(counts[m] == 1 for m in members):
            SharedInput(members)
            found.append(tuple(names[m] for m in members))
    return found


def unfuse_layer(layer: LowRankLinear) -> None:
    """Give a layer weights of its own again."""
    if layer.shared is not None:
        layer.shared = None
        layer.right.weight.data = layer.right.weight.data.clone()
