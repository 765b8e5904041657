"""`svd`: plain singular value decomposition of the weight, blind to activations (the classical baseline)."""

from __future__ import annotations

from collections.abc import Sequence

from unirank.analysis.scheme.base import Problem, Scheme, svd
from unirank.types import Factors


def decompose(problems: Sequence[Problem]) -> list[Factors]:
    """`W = U S Vᵀ`; left `U S`, right `Vᵀ`, energies `S²`. No damping."""
    return svd([problem.weight.to(problem.work) for problem in problems], [problem.max_rank for problem in problems])


SCHEME = Scheme("svd", needs_moment=False, decompose=decompose)
