"""The decoder's layers and its linears, found by structure and never by the model's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unirank.errors import InputError
from unirank.types import SUBLAYERS, LinearSpec

# Config keys by which transformers' mixture-of-experts models give their number of experts.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def find_linears(model: nn.Module) -> tuple[str, tuple[LinearSpec, ...]]:
    """Path of the decoder's layer list, and every linear inside its layers, by structure.

    The layers are the outermost ModuleList with the most linear weights. Inside a layer, the linears fall into two
    groups by the child module that holds them (linears that hang on the layer itself form a group of their own, as
    in OPT); the first group is the attention sublayer, the second the MLP. Calibration checks that they run in that
    order.

    Raises InputError when there is no such list, when a layer has other than two groups, or when it holds experts.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (best and path.startswith(best[1] + ".")):
            size = sum(linear.weight.numel() for _, linear in _linears_in(module))
            if size and (best is None or size > best[0]):
                best = (size, path, module)
    if best is None:
        raise InputError(
            f"{type(model).__name__} has no decoder layers with linear maps (nn.Linear or Conv1D), "
            "so there is nothing to compress."
        )
    _, layers_path, layers = best
    specs: list[LinearSpec] = []
    for index, layer in enumerate(layers):
        specs.extend(_linears_of_layer(f"{layers_path}.{index}", index, layer))
    return layers_path, tuple(specs)


def _linears_of_layer(path: str, index: int, layer: nn.Module) -> Iterator[LinearSpec]:
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 3:
            raise InputError(
                f"Mixture-of-experts models are not supported: {path}.{name} stacks {parameter.shape[0]} experts."
            )
    for name, module in layer.named_modules():
        if isinstance(module, nn.ModuleList) and any(True for _ in _linears_in(module)):
            raise InputError(f"Mixture-of-experts models are not supported: {path}.{name} is a list of sub-networks.")
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, linear in _linears_in(layer):
        groups.setdefault(name.split(".")[0] if "." in name else "", []).append((name, linear))
    if len(groups) != len(SUBLAYERS):
        found = ", ".join(repr(group or "the layer itself") for group in groups) or "none"
        raise InputError(
            f"{path} must hold its linears in two groups, attention and MLP; found {len(groups)}: {found}."
        )
    for sublayer, members in zip(SUBLAYERS, groups.values(), strict=True):
        for name, linear in members:
            m, n = weight_of(linear).shape
            yield LinearSpec(f"{path}.{name}", index, sublayer, name, m, n)


def _linears_in(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight as `[M, N]`, whichever way the module stores it (GPT-2's Conv1D keeps the transpose)."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def _refuse_experts(config: Any) -> None:
    text = config.get_text_config()
    for key in _EXPERT_KEYS:
        count = getattr(text, key, None)
        if isinstance(count, int) and count > 1:
            raise InputError(
                f"Mixture-of-experts models are not supported: {text.model_type} has {key} = {count}; "
                "unirank compresses dense decoders."
            )
