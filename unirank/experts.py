"""Stacked experts: modules that hold one matrix of every expert in a parameter, found by what they have.

Such a module holds two parameters, `gate_up_proj` (or `up_proj`) and `down_proj`, with one matrix for every expert. It
is called in one of two ways: as in transformers' common interface (`use_experts_implementation`), with hidden states
`[T, D]`, the experts of every token `[T, k]` and their weights `[T, k]`; or as in Llama 4, with hidden states
`[E T, D]`, all tokens for each expert, times the router's weights, which are zero where an expert is not to work. What
the first kind does beside its matrices (gates, clamps, norms) is its own; the second multiplies `up` by the activation
of `gate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unirank.errors import InputError
from unirank.types import ExpertSpec, LinearSpec

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")  # that the interface sets on a module


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is one of stacked experts, and dense."""
    if not _has_flags(module) and not _takes_all_tokens(module):
        return False
    stacks = [getattr(module, name, None) for name in stacks_of(module)]
    sizes = {stack.shape[0] for stack in stacks if isinstance(stack, torch.Tensor) and stack.dim() == 3}
    return len(sizes) == 1 and all(isinstance(stack, torch.Tensor) and stack.dim() == 3 for stack in stacks)


def _has_flags(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS)


def _takes_all_tokens(module: Any) -> bool:
    """Whether it is of Llama 4's kind: two stacks, each `[E, N, M]`, an activation, and one argument."""
    if set(module._parameters) != {"gate_up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
        return False
    first, second = module.gate_up_proj, module.down_proj
    if first is None or second is None or first.dim() != 3 or second.dim() != 3:
        return False
    fits = first.shape[1] == second.shape[2] and first.shape[2] == 2 * second.shape[1]
    return fits and len(inspect.signature(module.forward).parameters) == 1


def takes_all_tokens(module: Any) -> bool:
    """Whether a module of experts is called with all tokens for each expert, as Llama 4's is."""
    return not _has_flags(module)


def is_transposed(module: Any) -> bool:
    """Whether its parameters are `[E, N, M]`."""
    return True if takes_all_tokens(module) else module.is_transposed


def stacks_of(module: Any) -> tuple[str, str]:
    """The names of the two parameters, in the order in which they are multiplied by."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


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
        m, n = (n, m) if is_transposed(module) else (m, n)
        for expert in range(count):
            yield ExpertSpec(
                f"{path}.{name}.{expert}", layer, sublayer, f"{kind}.{name}", m, n, expert, is_transposed(module)
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
    return weight.T if is_transposed(module) else weight


def expert_bias(module: Any, name: str, expert: int) -> torch.Tensor | None:
    """The bias `[M]` that belongs to it; None without one."""
    stacked = getattr(module, f"{name}_bias", None)
    return None if stacked is None else stacked[expert]


def activated(module: Any, products: torch.Tensor) -> torch.Tensor:
    """`[T, M]` of the first matrix to what the second one reads, `[T, F]`, as the module's own code does it."""
    if takes_all_tokens(module):
        gate, up = products.chunk(2, dim=-1)
        return up * module.act_fn(gate)
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


def called_with(
    name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a module of experts was called with: hidden states `[T, D]`, experts `[T, k]` and their weights `[T, k]`.

    Where it takes all tokens, these are the tokens that are not zero, each with the expert that it is for; their
    lengths stand for the weights, which are in them (**choice**).

    Raises InputError for anything else.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if takes_all_tokens(module) and len(tensors) == 1:
        hidden, index = routed_in(tensors[0], count_of(module))
        return hidden, index[:, None], hidden.double().norm(dim=1, keepdim=True)
    if len(tensors) == 3:
        hidden, index, weights = tensors
        same = index.shape == weights.shape and hidden.dim() == 2 and index.shape[:1] == hidden.shape[:1]
        if same and index.dim() == 2 and not index.is_floating_point():
            return hidden, index, weights
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
    raise InputError(
        f"{name} must be called with hidden states [T, D], experts [T, k] and weights [T, k], got {shapes or 'none'}."
    )


def routed_in(hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens for each of `count` experts, `[E T, D]`, those that are not zero, `[S, D]`, and whom each is for,
    int64 `[S]`."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = (flat != 0).any(1).nonzero().squeeze(1)
    return flat[rows], rows // (len(flat) // count)
