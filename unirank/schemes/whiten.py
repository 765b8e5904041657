"""`whiten`: the rank-r map with the least output error on the calibration tokens.

SVD-LLM (arXiv 2403.07378, Cholesky of C), SVD-LLM V2 (2503.12340, SVD of C) and Swift-SVD (2604.01609, eigenvectors of
the outputs) are this one scheme in exact arithmetic: `W' = U_r U_rᵀ W`, `U` the eigenvectors of `W C Wᵀ`, energies its
eigenvalues. So neither a factor of `C` nor an inverse is needed, and a singular `C` needs no damping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unirank import ops
from unirank.schemes.base import WORK_DTYPE, Problem, Scheme, eigh_descending
from unirank.types import Factors

# How far the columns of `left` may be from orthonormal (largest entry of `UᵀU - I`) before the dearer route is taken:
# far below the rounding of a float32 factor.
ORTHOGONALITY = 1e-9


@dataclass(frozen=True)
class _Square:
    """The square part `r [K, N]` of a weight, and how eigenvectors come back from it; a wide weight is its own."""

    weight: torch.Tensor
    r: torch.Tensor
    q: torch.Tensor | None = None  # orthonormal [M, N], where one was computed

    @property
    def tall(self) -> bool:
        return self.weight.shape[0] > self.weight.shape[1]

    def lift(self, u: torch.Tensor) -> torch.Tensor:
        """Eigenvectors `[K, R]` of the square problem, brought to `[M, R]`."""
        if not self.tall:
            return u
        if self.q is not None:
            return self.q @ u
        return self.weight @ torch.linalg.solve_triangular(self.r, u, upper=True)


def decompose(problems: Sequence[Problem]) -> list[Factors]:
    """left `U_r`, right `U_rᵀ W`; energies are the eigenvalues of `W C Wᵀ`. No damping.

    A tall `W` (M > N) is first brought to its square part by `W = Q R`: `W C Wᵀ = Q (R C Rᵀ) Qᵀ` has the eigenvectors
    `Q Û` with `Û` those of `R C Rᵀ [N, N]`. `R` is the Cholesky factor of `WᵀW`, several times cheaper than a QR; the
    orthogonality of each result is checked, and where it falls short, as for a condition beyond 1e3, a Householder QR
    takes over. (**choice**: method 3 suggests `U = W S V / sigma`, which loses orthogonality where sigma is small.)
    """
    squares = [_square(problem.weight.to(WORK_DTYPE)) for problem in problems]
    factors = _solve(problems, squares)
    for i, square in enumerate(squares):
        if square.tall and square.q is None and not _orthonormal(factors[i].left):
            factors[i : i + 1] = _solve([problems[i]], [_householder(square.weight)])
    return factors


def _solve(problems: Sequence[Problem], squares: Sequence[_Square]) -> list[Factors]:
    outputs = []
    for problem, square in zip(problems, squares, strict=True):
        assert problem.moment is not None
        output = square.r @ problem.moment.c @ square.r.T
        outputs.append((output + output.T) / 2)  # the two products round differently
    factors = []
    for problem, square, (energy, u) in zip(problems, squares, eigh_descending(outputs), strict=True):
        u = u[:, : problem.max_rank]
        factors.append(Factors(square.lift(u), u.T @ square.r, energy, damping=0.0))
    return factors


def _square(weight: torch.Tensor) -> _Square:
    if weight.shape[0] <= weight.shape[1]:
        return _Square(weight, weight)
    r, failed = torch.linalg.cholesky_ex(_gram(weight), upper=True)
    return _householder(weight) if bool(failed) else _Square(weight, r)


def _householder(weight: torch.Tensor) -> _Square:
    q, r = torch.linalg.qr(weight)
    return _Square(weight, r, q)


def _orthonormal(u: torch.Tensor) -> bool:
    error = _gram(u).sub_(torch.eye(u.shape[1], dtype=u.dtype, device=u.device))
    return bool(error.abs().max() <= ORTHOGONALITY)  # False for NaN


def _gram(a: torch.Tensor) -> torch.Tensor:
    gram, total = a.new_zeros((a.shape[1], a.shape[1])), a.new_zeros(a.shape[1])
    ops.gram_accumulate_(gram, total, a)
    return gram


SCHEME = Scheme("whiten", needs_moment=True, decompose=decompose)
