"""`whiten`: the rank-r map with the least output error on the calibration tokens.

SVD-LLM (arXiv 2403.07378, Cholesky of C), SVD-LLM V2 (2503.12340, SVD of C) and Swift-SVD (2604.01609, eigenvectors of
the outputs) are this one scheme in exact arithmetic: `W' = U_r U_rᵀ W`, `U` the eigenvectors of `W C Wᵀ`, energies its
eigenvalues. So neither a factor of `C` nor an inverse is needed, and a singular `C` needs no damping.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unirank.schemes.base import WORK_DTYPE, Problem, Scheme, eigh_descending
from unirank.types import Factors


def decompose(problems: Sequence[Problem]) -> list[Factors]:
    """left `U_r`, right `U_rᵀ W`; energies are the eigenvalues of `W C Wᵀ`. No damping.

    A tall `W` (M > N) is first brought to its square part by `W = Q R`: `W C Wᵀ = Q (R C Rᵀ) Qᵀ` has the eigenvectors
    `Q Û` with `Û` those of `R C Rᵀ [N, N]`. (**choice**: method 3 suggests `U = W S V / sigma`, which loses
    orthogonality where sigma is small; the QR route is orthogonal to rounding at every rank.)
    """
    square: list[torch.Tensor] = []  # [K, N]: W itself, or R of a tall W
    bases: list[torch.Tensor | None] = []
    for problem in problems:
        weight = problem.weight.to(WORK_DTYPE)
        if weight.shape[0] > weight.shape[1]:
            q, r = torch.linalg.qr(weight)
            bases.append(q)
            square.append(r)
        else:
            bases.append(None)
            square.append(weight)
    outputs = []
    for problem, matrix in zip(problems, square, strict=True):
        assert problem.moment is not None
        output = matrix @ problem.moment.c @ matrix.T
        outputs.append((output + output.T) / 2)  # the two products round differently
    factors = []
    for problem, basis, matrix, (energy, u) in zip(problems, bases, square, eigh_descending(outputs), strict=True):
        u = u[:, : problem.max_rank]
        left = u if basis is None else basis @ u
        factors.append(Factors(left, u.T @ matrix, energy, damping=0.0))
    return factors


SCHEME = Scheme("whiten", needs_moment=True, decompose=decompose)
