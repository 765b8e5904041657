"""Targets in a model, however it holds them: a linear, or an expert's matrix in a stack; dense, or low-rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from unirank.errors import InputError
from unirank.experts import expert_bias, expert_weight
from unirank.models.low_rank import count_target, make_low_rank
from unirank.models.low_rank_experts import LowRankExperts, make_low_rank_experts
from unirank.models.structure import weight_of
from unirank.types import ExpertSpec, Form, LinearSpec


def target_weight(model: nn.Module, spec: LinearSpec) -> torch.Tensor:
    """The dense weight `[M, N]` of a target, a view of what `model` holds."""
    if isinstance(spec, ExpertSpec):
        return expert_weight(model.get_submodule(spec.module), spec.parameter, spec.expert)
    return weight_of(model.get_submodule(spec.name))


def has_bias(model: nn.Module, spec: LinearSpec) -> bool:
    """Whether a target of a dense model has a bias."""
    if isinstance(spec, ExpertSpec):
        return expert_bias(model.get_submodule(spec.module), spec.parameter, spec.expert) is not None
    return model.get_submodule(spec.name).bias is not None


def expert_of(model: nn.Module, name: str) -> tuple[str, str, int] | None:
    """Of the name of an expert's matrix the module's path, the parameter and the number; None for any other name."""
    path, _, number = name.rpartition(".")
    module, _, parameter = path.rpartition(".")
    if not (number.isdecimal() and module):
        return None
    try:
        holder = model.get_submodule(module)
    except AttributeError:
        return None
    stacked = parameter in holder._parameters or parameter in holder._buffers
    return (module, parameter, int(number)) if stacked else None


def refuse_expert_targets(model: nn.Module, names: Iterable[str], what: str) -> None:
    """Raise InputError where `what` cannot be had for experts, and there are some among the targets `names`."""
    found = next(filter(None, (expert_of(model, name) for name in names)), None)
    if found is not None:
        raise InputError(f"{what} is not available for mixtures of experts, whose matrices are stacked ({found[0]}).")


def count_of_target(model: nn.Module, name: str) -> int:
    """Weight parameters of the target `name`, dense or low-rank, without its bias."""
    found = expert_of(model, name)
    if found is None:
        return count_target(model.get_submodule(name))
    path, parameter, number = found
    holder = model.get_submodule(path)
    if isinstance(holder, LowRankExperts):
        return holder.count_target(parameter, number)
    return getattr(holder, parameter)[number].numel()


def has_added_bias(model: nn.Module, name: str) -> bool:
    """Whether the target `name` is low-rank and has a bias that the dense model has not."""
    found = expert_of(model, name)
    if found is None:
        return bool(getattr(model.get_submodule(name), "added_bias", False))
    holder = model.get_submodule(found[0])
    return isinstance(holder, LowRankExperts) and found[1] in holder.added_bias


def make_all_low_rank(model: nn.Module, ranks: Mapping[str, int], *, biased: Collection[str], form: Form) -> None:
    """Replace all targets that `ranks` names by empty low-rank ones; those in `biased` get biases of zeros.

    Raises InputError like `make_low_rank` and `make_low_rank_experts`.
    """
    stacks: dict[str, dict[str, dict[int, int]]] = {}
    adding: dict[str, set[str]] = {}
    for name, rank in ranks.items():
        found = expert_of(model, name)
        if found is None:
            make_low_rank(model, name, rank, add_bias=name in biased, form=form)
            continue
        path, parameter, number = found
        stacks.setdefault(path, {}).setdefault(parameter, {})[number] = rank
        if name in biased:
            adding.setdefault(path, set()).add(parameter)
    for path, known in stacks.items():
        make_low_rank_experts(model, path, known, biased=adding.get(path, ()), form=form)
