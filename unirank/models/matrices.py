"""A stored matrix and its shares: rows and columns of it, as numbers or as whole numbers with scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from unirank.models.bits import Bits, pack, unpack


@dataclass(frozen=True)
class Matrix:
    """`[M, N]` as it is stored.

    Attributes:
        weight: the numbers; whole ones are int8, also those of 4 bits.
        scale: `[M, N / group]`: `weight[m, n] scale[m, n // group]` is meant; None where the numbers are meant.
        bits: that the whole numbers take in memory; None where they are not whole.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    bits: Bits | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(M, N)`."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def group(self) -> int:
        """Numbers of a row that share a scale."""
        return self.shape[1] if self.scale is None else self.shape[1] // self.scale.shape[1]

    def take_rows(self, index: torch.Tensor) -> Matrix:
        """The rows that int64 `index` names."""
        parts = (self.weight, self.scale)
        weight, scale = (None if part is None else part.index_select(0, index.to(part.device)) for part in parts)
        assert weight is not None
        return Matrix(weight, scale, self.bits)

    def take_columns(self, first: int, count: int) -> Matrix:
        """`count` columns from `first` on."""
        scale = self.scale
        if scale is not None and scale.shape[1] > 1:
            finer = math.gcd(self.group, first, count)
            scale = scale.repeat_interleave(self.group // finer, 1).narrow(1, first // finer, count // finer)
        return Matrix(self.weight.narrow(1, first, count), scale, self.bits)

    def below_identity(self) -> Matrix:
        """`cat(I, self)`, `[N + M, N]`."""
        n = self.shape[1]
        eye = torch.eye(n, dtype=self.weight.dtype, device=self.weight.device)
        scale = None if self.scale is None else torch.cat((self.scale.new_ones(n, self.scale.shape[1]), self.scale))
        return Matrix(torch.cat((eye, self.weight)), scale, self.bits)

    def to(self, device: torch.device, dtype: torch.dtype) -> Matrix:
        """On `device`; numbers that are not whole as `dtype`, scales as they are."""
        weight = self.weight.to(device) if self.bits else self.weight.to(device, dtype)
        return Matrix(weight.contiguous(), None if self.scale is None else self.scale.to(device), self.bits)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """`[M, N]` as numbers of `dtype`."""
        return self.weight.to(dtype) if self.scale is None else meant(self.weight, self.scale, dtype)

    def packed(self) -> torch.Tensor:
        """The numbers as they take least memory."""
        return pack(self.weight) if self.bits == 4 else self.weight


def meant(numbers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`numbers[m, n] scale[m, n // group]`, `[M, N]`, computed in float32, as `dtype`."""
    return (numbers * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], 1).float()).to(dtype)


def read_matrix(tensors: Mapping[str, torch.Tensor], name: str, columns: int) -> Matrix | None:
    """The matrix of so many `columns` that a checkpoint stores below `name`, which ends with a dot; None without one.

    Its tensors are `weight`, or `quantized` and `scale` as `QuantizedLinear` has them.
    """
    quantized = tensors.get(f"{name}quantized")
    if quantized is None:
        weight = tensors.get(f"{name}weight")
        return None if weight is None or weight.dim() != 2 else Matrix(weight)
    scale = tensors.get(f"{name}scale")
    if scale is None:
        return None
    bits: Bits = 8 if quantized.dtype == torch.int8 else 4
    return Matrix(quantized if bits == 8 else unpack(quantized, columns), scale, bits)


def stacked(parts: Sequence[Matrix]) -> list[Matrix]:
    """All rows of all `parts`, in order, in as few matrices as their ways to be stored allow."""
    found = []
    for (bits, _), alike in groupby(parts, key=lambda part: (part.bits, part.group if part.scale is not None else 0)):
        together = list(alike)
        scales = [part.scale for part in together if part.scale is not None]
        weight = torch.cat([part.weight for part in together])
        found.append(Matrix(weight, torch.cat(scales) if scales else None, bits))
    return found
