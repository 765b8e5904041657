"""Stacked experts: the modules of transformers' common interface, found by what they have and never by their names.

Such a module holds two parameters, `gate_up_proj` (or `up_proj`) and `down_proj`, with one matrix for every expert, and
is called with hidden states `[T, D]`, the experts of every token `[T, k]` and their weights `[T, k]`
(transformers' `use_experts_implementation`). What it does beside its matrices (gates, clamps, norms) is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unirank.types import ExpertSpec, LinearSpec

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # that the interface sets on a module


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is one of stacked experts, and dense."""
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return False
    stacks = [getattr(module, name, None) for name in stacks_of(module)]
    sizes = {stack.shape[0] for stack in stacks if isinstance(stack, torch.Tensor) and stack.dim() == 3}
    return len(sizes) == 1 and all(isinstance(stack, torch.Tensor) and stack.dim() == 3 for stack in stacks)


def stacks_of(module: Any) -> tuple[str, str]:
    """The names of the two parameters, in the order in which they are multiplied by."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def count_of(module: Any) -> int:
    """How many experts there are."""
    return getattr(module, stacks_of(module)[0]).shape[0]


def experts_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of stacked experts, by its path."""
    for path, child in module.named_modules():
        if is_experts(child):
            yield path, child


def specs_of(path: str, layer: int, sublayer: str, kind: str, module: Any) -> Iterator[ExpertSpec]:
    """The targets of a module of experts: of each parameter, each expert's matrix.

    Args:
        path: from the model's root.
        kind: path in the layer.
    """
    for name in stacks_of(module):
        count, m, n = getattr(module, name).shape
        m, n = (n, m) if module.is_transposed else (m, n)
        for expert in range(count):
            yield ExpertSpec(
                f"{path}.{name}.{expert}", layer, sublayer, f"{kind}.{name}", m, n, expert, module.is_transposed
            )


def as_modules(specs: Sequence[LinearSpec]) -> list[LinearSpec]:
    """`specs` with one in the place of all matrices of a module of experts: the module, as if it were a linear.

    That is how the trace of a layer sees it: it runs once, on one input.
    """
    found: dict[str, LinearSpec] = {}
    for spec in specs:
        if isinstance(spec, ExpertSpec):
            first = LinearSpec(spec.module, spec.layer, spec.sublayer, spec.kind.rpartition(".")[0], spec.m, spec.n)
            found.setdefault(spec.module, first)
            found[spec.module] = replace(found[spec.module], m=spec.m)  # the last matrix gives the output
        else:
            found[spec.name] = spec
    return list(found.values())


def expert_weight(module: Any, name: str, expert: int) -> torch.Tensor:
    """The matrix `[M, N]` of one expert, a view of the parameter `name`."""
    weight = getattr(module, name)[expert]
    return weight.T if module.is_transposed else weight


def expert_bias(module: Any, name: str, expert: int) -> torch.Tensor | None:
    """The bias `[M]` that belongs to it; None without one."""
    stacked = getattr(module, f"{name}_bias", None)
    return None if stacked is None else stacked[expert]


def activated(module: Any, products: torch.Tensor) -> torch.Tensor:
    """`[T, M]` of the first matrix to what the second one reads, `[T, F]`, as the module's own code does it."""
    return module._apply_gate(products) if module.has_gate else module.act_fn(products)


def second_input(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What the second matrix of `expert` reads, `[T, F]`, for the tokens `x [T, D]`."""
    first, _ = stacks_of(module)
    return activated(module, F.linear(x, expert_weight(module, first, expert), expert_bias(module, first, expert)))


def routed(index: torch.Tensor, count: int) -> list[torch.Tensor]:
    """For each of `count` experts the places in `index` (int64 `[T, k]`, as one row) that name it, ascending.

    A number beyond the last expert names none.
    """
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat.clamp_max(count), minlength=count + 1).tolist()
    return list(order.split(sizes))[:count]
