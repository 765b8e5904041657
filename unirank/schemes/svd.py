"""`svd`: plain singular value decomposition of the weight, blind to activations (the classical baseline)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unirank import ops
from unirank.schemes.base import WORK_DTYPE, Problem, Scheme
from unirank.types import Factors


def decompose(problems: Sequence[Problem]) -> list[Factors]:
    """`W = U S Vᵀ`; left `U S`, right `Vᵀ`, energies `S²`. No damping."""
    results: dict[int, Factors] = {}
    for shape in sorted({tuple(problem.weight.shape) for problem in problems}):
        members = [i for i, problem in enumerate(problems) if tuple(problem.weight.shape) == shape]
        u, s, vh = ops.batched_svd(torch.stack([problems[i].weight.to(WORK_DTYPE) for i in members]))
        for position, i in enumerate(members):
            rank = problems[i].max_rank
            left = u[position, :, :rank] * s[position, :rank]
            results[i] = Factors(left, vh[position, :rank], s[position].square(), damping=0.0)
    return [results[i] for i in range(len(problems))]


SCHEME = Scheme("svd", needs_moment=False, decompose=decompose)
