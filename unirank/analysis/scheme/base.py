"""What a scheme is, and the batched solvers that schemes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from unirank import ops
from unirank.types import Factors, Gradient, Moment

# Energies of one matrix span more decades than float32 resolves: with SmolLM2's outlier channels the largest
# eigenvalue of a layer-0 output moment is 1e8 times the median, and float32 would order the rest by noise.
WORK_DTYPE = torch.float64


# `Calibration.shrink` where nothing is said, of the schemes of our own presets (**choice**, docs/experiments.md).
SHRINK = 0.1


@dataclass(frozen=True)
class Problem:
    """One matrix to decompose: `weight [M, N]`, and the moment of its input and its gradients where asked for."""

    name: str
    weight: torch.Tensor
    moment: Moment | None
    max_rank: int  # factors are returned up to this rank, the spectrum whole
    gradient: Gradient | None = None
    work: torch.dtype = WORK_DTYPE  # the decomposition's; moment and gradient have it


@dataclass(frozen=True)
class Scheme:
    """A decomposition scheme: a name, what it needs, and a function from problems to factors (same order).

    Attributes:
        shrink: `Calibration.shrink` where nothing is said about it.
    """

    name: str
    needs_moment: bool
    decompose: Callable[[Sequence[Problem]], list[Factors]]
    needs_mean_abs: bool = False
    needs_gradient: bool = False
    shrink: float = 0.0


def eigh_descending(matrices: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Eigenvalues `[K]` (descending, clamped at 0) and eigenvectors `[K, K]` (columns) of symmetric PSD matrices.

    Matrices of one size are solved in one batch. The list is emptied, so that none is in memory twice meanwhile.
    Raises like `ops.batched_eigh`.
    """
    waiting = dict(enumerate(matrices))
    matrices.clear()
    results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for size in sorted({matrix.shape[0] for matrix in waiting.values()}):
        members = [i for i, matrix in waiting.items() if matrix.shape[0] == size]
        values, vectors = ops.batched_eigh(torch.stack([waiting.pop(i) for i in members]))
        for position, i in enumerate(members):
            # Rounding makes the tail of a semidefinite matrix negative; energy is not.
            results[i] = (values[position].flip(0).clamp_min(0.0), vectors[position].flip(1))
    return [results[i] for i in sorted(results)]


def svd(matrices: Sequence[torch.Tensor], max_ranks: Sequence[int]) -> list[Factors]:
    """`A = U S Vᵀ` of each: left `U S`, right `Vᵀ`, energies `S²`. Matrices of one shape are solved in one batch."""
    results: dict[int, Factors] = {}
    for shape in sorted({tuple(matrix.shape) for matrix in matrices}):
        members = [i for i, matrix in enumerate(matrices) if tuple(matrix.shape) == shape]
        u, s, vh = ops.batched_svd(torch.stack([matrices[i] for i in members]))
        for position, i in enumerate(members):
            left = u[position, :, : max_ranks[i]] * s[position, : max_ranks[i]]
            results[i] = Factors(left, vh[position, : max_ranks[i]], s[position].square(), damping=0.0)
    return [results[i] for i in range(len(matrices))]
