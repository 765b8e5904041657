"""What a scheme is, and the batched solvers that schemes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from unirank import ops
from unirank.types import Factors, Moment

# Energies of one matrix span more decades than float32 resolves: with SmolLM2's outlier channels the largest
# eigenvalue of a layer-0 output moment is 1e8 times the median, and float32 would order the rest by noise.
WORK_DTYPE = torch.float64


@dataclass(frozen=True)
class Problem:
    """One matrix to decompose: `weight [M, N]`, and the moment of its input when the scheme asks for it."""

    name: str
    weight: torch.Tensor
    moment: Moment | None
    max_rank: int  # factors are returned up to this rank, the spectrum whole


@dataclass(frozen=True)
class Scheme:
    """A decomposition scheme: a name, what it needs, and a function from problems to factors (same order)."""

    name: str
    needs_moment: bool
    decompose: Callable[[Sequence[Problem]], list[Factors]]


def eigh_descending(matrices: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Eigenvalues `[K]` (descending, clamped at 0) and eigenvectors `[K, K]` (columns) of symmetric PSD matrices.

    Matrices of one size are solved in one batch. Raises like `ops.batched_eigh`.
    """
    results: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(matrices)
    for size in sorted({matrix.shape[0] for matrix in matrices}):
        members = [i for i, matrix in enumerate(matrices) if matrix.shape[0] == size]
        values, vectors = ops.batched_eigh(torch.stack([matrices[i] for i in members]))
        for position, i in enumerate(members):
            # Rounding makes the tail of a semidefinite matrix negative; energy is not.
            results[i] = (values[position].flip(0).clamp_min(0.0), vectors[position].flip(1))
    return [result for result in results if result is not None]
