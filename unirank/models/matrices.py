"""A stored matrix and its shares: rows and columns of it, as numbers or as integers with scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Matrix:
    """`[rows, columns]`."""

    weight: torch.Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], name: str) -> Matrix | None:
        """The matrix that a checkpoint stores under `name`, or None."""
        return cls(tensors[name]) if name in tensors else None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def take_rows(self, index: torch.Tensor) -> Matrix:
        return Matrix(self.weight.index_select(0, index.to(self.weight.device)))

    def take_columns(self, first: int, count: int) -> Matrix:
        return Matrix(self.weight.narrow(1, first, count))

    def below_identity(self) -> Matrix:
        """`cat(I, self)`, `[columns + rows, columns]`."""
        eye = torch.eye(self.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        return Matrix(torch.cat((eye, self.weight)))

    @staticmethod
    def stack(parts: Sequence[Matrix]) -> Matrix:
        """All rows of all `parts`, in order."""
        return Matrix(torch.cat([part.weight for part in parts]))
