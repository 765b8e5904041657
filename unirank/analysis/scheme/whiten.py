"""`whiten`: the rank-r map with the least output error on the calibration tokens.

SVD-LLM (arXiv 2403.07378, Cholesky of C), SVD-LLM V2 (2503.12340, SVD of C) and Swift-SVD (2604.01609, eigenvectors of
the outputs) are this one scheme in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from unirank.analysis.scheme.base import Problem, Scheme
from unirank.analysis.scheme.two_sided import Target, solve
from unirank.types import Factors


def decompose(problems: Sequence[Problem]) -> list[Factors]:
    """left `U_r`, right `U_rᵀ W`, `U` the eigenvectors of `W C Wᵀ`, energies its eigenvalues. No damping."""
    targets = []
    for problem in problems:
        assert problem.moment is not None
        targets.append(Target(problem.weight.to(problem.work), problem.moment.c, None, problem.max_rank))
    return solve(targets)


SCHEME = Scheme("whiten", needs_moment=True, decompose=decompose)
