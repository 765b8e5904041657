"""Linears of a model become `QuantizedLinear`s: empty ones for a checkpoint's weights, or made of theirs by torchao."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unirank.errors import InputError
from unirank.models.bits import Bits, layout, pack
from unirank.models.low_rank import LowRankLinear
from unirank.models.quantized import KINDS, QuantizedLinear
from unirank.models.structure import weight_of


def require_torchao() -> None:
    """Raise InputError unless torchao is there."""
    try:
        with _quiet():
            import torchao.quantization  # noqa: F401
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("torchao"):
            raise
        raise InputError(
            "Quantised weights need torchao; install the extra: pip install 'unirank[quantize]'."
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """When torchao is imported, it warns of its libraries for GPUs that are not here, and torch of torchao."""
    loggers = [getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def put_empty(model: nn.Module, names: Iterable[str], bits: Bits, group_size: int | None) -> None:
    """Put empty quantised linears in the place of both matrices of every low-rank linear in `names`, and of the others.

    Raises InputError when there is no such linear.
    """
    for name in names:
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"{type(model).__name__} has no linear {name}, which is to be quantised.") from error
        if isinstance(linear, LowRankLinear):
            linear.put_quantized(*(empty(inner, bits, group_size) for inner in (linear.left, linear.right)))
        elif isinstance(linear, nn.Linear | Conv1D):
            model.set_submodule(name, empty(linear, bits, group_size))
        else:
            raise InputError(f"{name} is a {type(linear).__name__}, not a linear, so it cannot be quantised.")


def empty(linear: nn.Module, bits: Bits, group_size: int | None) -> QuantizedLinear:
    """A `QuantizedLinear` of the shape of `linear`, with its bias."""
    weight = weight_of(linear)
    m, n = weight.shape
    made = QuantizedLinear(n, m, *layout(bits, group_size, n), device=weight.device, dtype=weight.dtype)
    made.register_parameter("bias", linear.bias)  # pyright: ignore[reportArgumentType]
    return made.train(linear.training)


@torch.no_grad()
def quantized_of(
    linear: nn.Module, bits: Bits, group_size: int | None, weight: torch.Tensor | None = None
) -> QuantizedLinear:
    """`linear`, quantised by torchao from its weight in float32, with the scales as they are stored.

    Args:
        weight: `[M, N]`, in the place of its own.
    """
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    made = empty(linear, bits, group_size)
    weight = (weight_of(linear) if weight is None else weight).float()
    if made.in_features == 1:
        weight = weight.expand(-1, 2)  # torchao 0.18 fails at rows of one number; twice the same has the same scale
    shape = PerAxis(0) if made.group == made.in_features else PerGroup(made.group)
    holder = nn.Linear(*weight.shape[::-1], bias=False, device="meta")  # torchao takes modules
    holder.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    quantize_(holder, IntxWeightOnlyConfig(KINDS[made.bits], shape, scale_dtype=made.scale.dtype))
    found: Any = holder.weight
    numbers = found.qdata[:, : made.in_features]
    made.quantized.copy_(numbers if made.bits == 8 else pack(numbers))
    made.scale.copy_(found.scale)
    return made


@torch.no_grad()
def floats_of(linear: QuantizedLinear, dtype: torch.dtype, *, conv: bool = False) -> nn.Module:
    """The linear, or `Conv1D`, with the weights that `linear` stands for, in `dtype`."""
    weight = linear.dense_weight(dtype)
    m, n = weight.shape
    with torch.device("meta"):
        made: Any = Conv1D(m, n) if conv else nn.Linear(n, m, bias=False)
    made.weight = nn.Parameter((weight.T if conv else weight).contiguous())
    made.register_parameter("bias", linear.bias)
    return made.train(linear.training)


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Every quantised linear of `model`, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def refuse_quantized(model: nn.Module, done: str) -> None:
    """Raise InputError where a linear of `model` is quantised.

    Args:
        done: what is to be done with the model, as in "cannot be trained".
    """
    if quantized_linears(model):
        raise InputError(
            f"The model is quantised and cannot be {done}; take the checkpoint that it was quantised from, and "
            "quantise what comes of it."
        )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of what a checkpoint holds of `model`: parameters and persistent buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())
