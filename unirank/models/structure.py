"""The decoder's layers and its linears, found by structure and never by the model's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig
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

    Raises InputError when there is no such list, when a layer has other than two groups, when it holds experts or
    other weights that no linear map owns, or when layers share a weight.
    """
    found = _layer_list(model)
    if found is None:
        raise InputError(
            f"{type(model).__name__} has no decoder layers with linear maps (nn.Linear or Conv1D), "
            "so there is nothing to compress."
        )
    layers_path, layers = found
    specs: list[LinearSpec] = []
    for index, layer in enumerate(layers):
        specs.extend(_linears_of_layer(f"{layers_path}.{index}", index, layer))
    first: dict[int, str] = {}
    for spec in specs:
        other = first.setdefault(id(model.get_submodule(spec.name).weight), spec.name)
        if other != spec.name:
            raise InputError(f"{other} and {spec.name} are one weight; unirank compresses layers that share none.")
    return layers_path, tuple(specs)


def require_plain(model: nn.Module, done: str) -> None:
    """Check that weights are torch's own tensors, not another library's (quantised, sharded).

    Args:
        done: what is to be done with the model, as in "the model must be saved before".

    Raises InputError with the first weight that is something else.
    """
    for name, weight in model.named_parameters():
        if type(weight) not in (nn.Parameter, torch.Tensor):
            kind = type(weight)
            raise InputError(
                f"{name} is a {kind.__name__} of {kind.__module__.partition('.')[0]}, not a plain tensor; the model "
                f"must be {done} before its weights are quantised or sharded in memory."
            )


def _layer_list(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (best and path.startswith(best[1] + ".")):
            size = sum(linear.weight.numel() for _, linear in _linears_in(module))
            if size and (best is None or size > best[0]):
                best = (size, path, module)
    return None if best is None else best[1:]


def _linears_of_layer(path: str, index: int, layer: nn.Module) -> Iterator[LinearSpec]:
    for name, parameter in _other_weights(layer):
        if parameter.dim() > 2:
            where = f"{path}.{name}"
            if _says_experts(name):
                raise InputError(
                    f"Mixture-of-experts models are not supported: {where} stacks {parameter.shape[0]} experts."
                )
            raise InputError(
                f"{where} is a weight {list(parameter.shape)} that belongs to no linear map; unirank compresses "
                "layers whose matrices are those of nn.Linear or Conv1D."
            )
    for name in _lists_of_networks(layer):
        start = "Mixture-of-experts models are not supported: " if _says_experts(name) else ""
        raise InputError(
            f"{start}{path}.{name} is a list of sub-networks, of which it is not known which tokens pass through it."
        )
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


def _other_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Matrices and stacks of them that belong to no linear map and to no convolution, by name.

    A vector in a shape with ones, `[1, 1, D]`, is none of them.
    """
    for path, child in module.named_modules():
        if not isinstance(child, nn.Linear | Conv1D | nn.Embedding | _ConvNd):
            for name, parameter in child.named_parameters(prefix=path, recurse=False):
                if sum(size > 1 for size in parameter.shape) > 1:
                    yield name, parameter


def _lists_of_networks(module: nn.Module) -> Iterator[str]:
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and any(True for _ in _linears_in(child)):
            yield name


def _says_experts(path: str) -> bool:
    """Whether a module calls itself so. Its shape does not tell: heads are stacked like experts (XLNet, Zamba)."""
    return "expert" in path


def _linears_in(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child


def weight_of(linear: nn.Module) -> torch.Tensor:
    """The weight as `[M, N]`, whichever way the module stores it (GPT-2's Conv1D keeps the transpose)."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(linear, Conv1D) else weight


def refuse_experts(model: nn.Module, config: PretrainedConfig) -> None:
    """Raise InputError where `config` states several experts and the decoder layers of `model` hold them.

    A configuration may state experts that no layer has: Doge without `is_moe`, the first layers of DeepSeek.
    """
    stated = stated_experts(config)
    if stated is None:
        return
    found = _layer_list(model)
    for layer in [model] if found is None else found[1]:
        if any(True for _ in _other_weights(layer)) or any(True for _ in _lists_of_networks(layer)):
            raise InputError(
                f"Mixture-of-experts models are not supported: {stated}; unirank compresses dense decoders."
            )


def stated_experts(config: PretrainedConfig) -> str | None:
    """How many experts a configuration, or one inside it, states: "mixtral has num_local_experts = 8"."""
    stated = vars(config)  # and not getattr: that raises where the value differs by layer
    for key in _EXPERT_KEYS:
        name = config.attribute_map.get(key, key)
        count = stated.get(name)
        if isinstance(count, int) and count > 1:
            return f"{config.model_type or type(config).__name__} has {name} = {count}"
    inner = (value for value in stated.values() if isinstance(value, PretrainedConfig))
    return next(filter(None, map(stated_experts, inner)), None)
