"""The decoder's layers and its linears, found by structure and never by the model's name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from unirank.errors import InputError
from unirank.experts import count_of, experts_in, is_experts, specs_of
from unirank.models.decoder import lists_of_decoder
from unirank.types import BLOCK, SUBLAYERS, ExpertSpec, LinearSpec, ListedSpec, Sublayer

# Config keys by which transformers' mixture-of-experts models give their number of experts.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def find_linears(model: nn.Module, *, idle: Collection[str] = ()) -> tuple[str, tuple[LinearSpec, ...]]:
    """Path of the decoder's layer list, and every linear inside its layers, by structure.

    The layers are the outermost ModuleList of the text decoder with the most linear weights. Inside a layer, the
    linears fall into groups by the child module that holds them (linears that hang on the layer itself form a group of
    their own, as in OPT), which are its sublayers: how they stand to each other and to the residual stream is read from
    a run (see `layerwise.trace`). Of two, the first is called "attention" and the second "mlp"; any other, and one with
    weights of another kind (a convolution, state-space parameters), by its module's name. What is no linear stays
    whole, and so do the linears in `idle`.

    Raises InputError when there is no such list, when a layer has no linears or holds experts, or when layers share a
    weight.
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
        specs.extend(_linears_of_layer(f"{layers_path}.{index}", index, layer, idle))
    first: dict[tuple[int, int | None], str] = {}
    for spec in specs:
        expert = spec.expert if isinstance(spec, ExpertSpec) else None
        other = first.setdefault((id(spec.stored_in(model)), expert), spec.name)
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
    for path, module in lists_of_decoder(model):
        if not (best and path.startswith(best[1] + ".")):
            size = sum(linear.weight.numel() for _, linear in _linears_in(module))
            if size and (best is None or size > best[0]):
                best = (size, path, module)
    return None if best is None else best[1:]


def _linears_of_layer(path: str, index: int, layer: nn.Module, idle: Collection[str]) -> Iterator[LinearSpec]:
    for name, parameter in _unknown_experts(layer):
        raise InputError(
            f"{path}.{name} stacks experts, {list(parameter.shape)}, and their module is not one of transformers' "
            "common interface, so it is not known which tokens pass through which."
        )
    lists = list(_lists_of_networks(layer))  # the outer ones come first
    groups: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, holder in _holders_in(layer):
        if f"{path}.{name}" in idle:
            continue
        groups.setdefault(name.split(".")[0] if "." in name else "", []).append((name, holder))
    if not groups:
        raise InputError(f"{path} holds no linear maps, so there is nothing in it to compress.")
    names = _names(layer, list(groups))
    for group, members in groups.items():
        sublayer = names[group]
        for name, holder in members:
            if is_experts(holder):
                yield from specs_of(f"{path}.{name}", index, sublayer, name, holder)
            else:
                m, n = weight_of(holder).shape
                own = (f"{path}.{name}", index, sublayer, name, m, n)
                networks = next((networks for networks in lists if name.startswith(f"{networks}.")), None)
                if networks is None:
                    yield LinearSpec(*own)
                else:
                    member = int(name.removeprefix(f"{networks}.").partition(".")[0])
                    yield ListedSpec(*own, f"{path}.{networks}", member)


def _names(layer: nn.Module, groups: Sequence[str]) -> dict[str, Sublayer]:
    """What people call the sublayers that these child modules of a layer are; "" is the layer itself."""
    own = {group: f"{group}_" if group == BLOCK else group or "rest" for group in groups}
    if len(groups) != len(SUBLAYERS):
        return own
    attention = next((group for group in groups if "attention" in group or "attn" in group), None)
    plain = [g for g in groups if g in ("", attention) or not holds_other_weights(layer.get_submodule(g))]
    if attention is None and len(plain) == len(groups):
        attention = plain[0]
    return own | {group: SUBLAYERS[0 if group == attention else 1] for group in plain}


def holds_other_weights(module: nn.Module) -> bool:
    """Whether it holds a convolution, or a matrix that belongs to no linear map and to no experts."""
    if any(isinstance(child, _ConvNd) for child in module.modules()):
        return True
    known = tuple(f"{path}.".lstrip(".") for path, _ in experts_in(module))
    return any(not name.startswith(known) for name, _ in _other_weights(module))


def _other_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Matrices and stacks of them that belong to no linear map and to no convolution, by name.

    A vector in a shape with ones, `[1, 1, D]`, is none of them.
    """
    for path, child in module.named_modules():
        if not isinstance(child, nn.Linear | Conv1D | nn.Embedding | _ConvNd):
            for name, parameter in child.named_parameters(prefix=path, recurse=False):
                if sum(size > 1 for size in parameter.shape) > 1:
                    yield name, parameter


def _holders_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with matrices to compress: linears but for routers, and stacked experts."""
    routers = {id(router) for router in _routers_in(module)}
    for name, child in module.named_modules():
        if is_experts(child) or (isinstance(child, nn.Linear | Conv1D) and id(child) not in routers):
            yield name, child


def _routers_in(module: nn.Module) -> Iterator[nn.Module]:
    """Linears beside experts, stacked or listed, with an output for each: they decide who works, and stay whole."""
    counts = [(path, count_of(experts)) for path, experts in experts_in(module)]
    counts += [(path, len(list(module.get_submodule(path).children()))) for path in _lists_of_networks(module)]
    for path, count in counts:
        parent = path.rpartition(".")[0]
        for name, linear in _linears_in(module.get_submodule(parent)):
            inside = f"{parent}.{name}".lstrip(".").startswith(f"{path}.")
            if not inside and weight_of(linear).shape[0] == count > 1:
                yield linear


def _unknown_experts(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Stacks in a module that calls itself one of experts, and is none that is understood."""
    known = tuple(f"{path}." for path, _ in experts_in(module))
    for name, parameter in _other_weights(module):
        if parameter.dim() > 2 and _says_experts(name) and not name.startswith(known):
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
    """Raise InputError where `config` states several experts and the layers of `model` hold them in an unknown way.

    A configuration may state experts that no layer has: Doge without `is_moe`, the first layers of DeepSeek.
    """
    stated = stated_experts(config)
    if stated is None:
        return
    found = _layer_list(model)
    layers = [model] if found is None else list(found[1])
    understood = any(True for layer in layers for _ in (*experts_in(layer), *_lists_of_networks(layer)))
    for layer in layers:
        known = tuple(f"{path}." for path, _ in experts_in(layer))
        others = [
            name
            for name, parameter in _other_weights(layer)
            # Beside experts that are understood, a matrix is a router's, or a state-space parameter.
            if not name.startswith(known) and not (understood and parameter.dim() == 2 and not _says_experts(name))
        ]
        if others:
            raise InputError(
                f"This mixture of experts is not supported: {stated}, and {others[0]} in its layers is not held as in "
                "transformers' common interface for experts."
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
