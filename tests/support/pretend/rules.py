"""Which tensors may meet in one op, as torch rules on a real GPU; everything else is a RuntimeError.

A CPU tensor without dimensions may be an operand of elementwise ops, but not their result, and not a part of `cat` and
`stack`. CPU indices may index a tensor of the GPU. `copy_` goes between devices. A generator belongs to the device of
the numbers it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Between devices by definition.
_CARRIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}
# The first argument and the values must be of one device; indices of a CPU are taken along.
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# No scalar of the CPU may stand among these: they are not elementwise.
_STRICT = {"aten::cat", "aten::stack", "aten::mm", "aten::addmm", "aten::bmm", "aten::embedding", "aten::gather"}


def check_devices(func: Any, args: Sequence[Any], kwargs: dict[str, Any], flat: Sequence[Any], pretend: type) -> None:
    """Raise RuntimeError where a tensor of the pretend GPU meets what is not there.

    Args:
        func: an overload of an op.
        flat: the leaves of `args` and `kwargs`.
        pretend: the class of the GPU's tensors.
    """
    name = func._schema.name
    if name in _CARRIES:
        return
    foreign = [t for t in flat if isinstance(t, Tensor) and _foreign(t, pretend)]
    if any(t.is_meta for t in foreign):  # it has no numbers, and a CPU's kernel would not say so
        _refuse(name, [t for t in foreign if t.is_meta], loose=False)
    if name in _INDEXED:
        values = args[2] if len(args) > 2 else kwargs.get("values")
        others = [t for t in (args[0], values) if isinstance(t, Tensor)]
        indices = [t for t in (args[1] if len(args) > 1 else kwargs["indices"]) if isinstance(t, pretend)]
        if indices and not isinstance(args[0], pretend):
            raise RuntimeError(
                f"{name}: indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        _refuse(name, [t for t in others if _foreign(t, pretend)], loose=False)
        return
    _refuse(name, foreign, loose=name not in _STRICT)
    for argument, value in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, Tensor) and _foreign(value, pretend):
            raise RuntimeError(f"{name}: the result is on {value.device}, its operands on cuda:0")


def check_generator(name: str, flat: Sequence[Any]) -> None:
    """Raise RuntimeError where a CPU's generator is to draw numbers on the GPU."""
    if any(isinstance(value, torch.Generator) and value.device.type == "cpu" for value in flat):
        raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")


def _foreign(tensor: Tensor, pretend: type) -> bool:
    return not isinstance(tensor, pretend)


def _refuse(name: str, foreign: Sequence[Tensor], *, loose: bool) -> None:
    bad = [t for t in foreign if t.dim() > 0 or not loose]
    if bad:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but got cuda:0 and "
            f"{', '.join(f'{t.device} {list(t.shape)}' for t in bad)}"
        )
