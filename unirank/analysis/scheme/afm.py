"""`afm`: `whiten` of the centred inputs, and a bias that restores the mean output (atomic feature mimicking).

Yu and Wu, "Compressing Transformers: Features Are Low-Rank, but Weights Are Not!", AAAI 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from unirank.analysis.scheme.base import SHRINK, Problem, Scheme
from unirank.analysis.scheme.two_sided import Target, solve
from unirank.types import Factors


def decompose(problems: Sequence[Problem]) -> list[Factors]:
    """`U` the eigenvectors of `W (C - mu muᵀ) Wᵀ`; the bias `(I - U_r U_rᵀ) W mu` is made at truncation. No damping.

    Never worse in output error than `whiten` at equal rank; the bias is not counted (method 1).
    """
    targets = []
    for problem in problems:
        assert problem.moment is not None
        c, mean = problem.moment.c, problem.moment.mean
        targets.append(Target(problem.weight.to(problem.work), c - torch.outer(mean, mean), None, problem.max_rank))
    return [
        dataclasses.replace(factors, mean=problem.moment.mean.clone())  # of its own: safetensors refuses shared memory
        for problem, factors in zip(problems, solve(targets), strict=True)
        if problem.moment is not None
    ]


SCHEME = Scheme("afm", needs_moment=True, decompose=decompose, shrink=SHRINK)
