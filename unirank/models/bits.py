"""How quantised matrices are stored: bits, groups, 4 bits two a byte. Needs neither torchao nor transformers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional as F

from unirank.errors import InputError

Bits = Literal[8, 4]
# Weights that share a scale: the largest that divides a row. (**choice**: each scale costs 16 bits or 32)
GROUPS = (128, 64, 32, 16)


def check_bits(bits: Any, group_size: Any, *, where: str = "") -> tuple[Bits, int | None]:
    """`bits` and `group_size`, which stays None with 8 bits (one scale a row), and is 128 with 4 where it is None.

    Args:
        where: what stands before the names in an error.

    Raises InputError unless they are legal.
    """
    if type(bits) is not int or bits not in (8, 4):
        raise InputError(f"{where}bits = {bits!r} is not legal; legal values: 8, 4.")
    if group_size is not None and (type(group_size) is not int or group_size not in GROUPS):
        legal = ", ".join(map(str, GROUPS))
        raise InputError(f"{where}group_size = {group_size!r} is not legal; legal values: {legal}.")
    return (8, group_size) if bits == 8 else (4, group_size or GROUPS[0])


def layout(bits: Bits, group_size: int | None, columns: int) -> tuple[Bits, int]:
    """Bits of a matrix with rows of so many `columns`, and how many of them share a scale.

    The group is the largest of `GROUPS`, up to `group_size`, that divides a row; without `group_size` it is a row. A
    row that none divides gets one scale, and 8 bits (**choice**: one scale is too little for 4).
    """
    for group in GROUPS:
        if group_size is not None and group <= group_size and columns % group == 0:
            return bits, group
    return 8, columns


def scale_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """In which dtype the scales of a matrix of `dtype` are: float16 has too small a range for them (**choice**)."""
    return torch.bfloat16 if (dtype or torch.get_default_dtype()) == torch.bfloat16 else torch.float32


def stored_shape(bits: Bits, rows: int, columns: int) -> tuple[torch.dtype, tuple[int, int]]:
    """Dtype and shape of the numbers of a matrix `[rows, columns]`, as they are stored."""
    return (torch.int8, (rows, columns)) if bits == 8 else (torch.uint8, (rows, -(-columns // 2)))


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers from -8 to 7, int8 `[M, N]`, each plus 8, two a byte, the earlier one low: uint8 `[M, ceil(N / 2)]`."""
    plus = F.pad((numbers + 8).view(torch.uint8), (0, numbers.shape[1] % 2))
    return plus[:, ::2] | (plus[:, 1::2] << 4)


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The numbers that `pack` was given, int8 `[M, columns]`."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return both[:, :columns].view(torch.int8) - 8
