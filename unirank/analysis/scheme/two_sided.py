"""The best rank-r map in an output metric: what `whiten`, `afm` and `kfac` share.

Minimise `E ||A (W - W') x||²` with `AᵀA = G` and `C = E[x xᵀ]`: `W' = A⁻¹ U_r U_rᵀ A W`, `U` the eigenvectors of
`A W C Wᵀ Aᵀ`, energies its eigenvalues. Neither a factor of `C` nor an inverse is needed, so a singular `C` needs no
damping; `G` is damped by the caller where it may be singular.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unirank import ops
from unirank.analysis.scheme.base import eigh_descending
from unirank.models import factoring
from unirank.queues import has_queues
from unirank.types import Factors

# How far the columns of `A left` may be from orthonormal (largest entry of `leftᵀ G left - I`) before the more
# expensive route is taken, by the dtype of the work: far below the rounding of a float32 factor; where the work itself
# is in float32, what its rounding sums up to over some thousand entries.
ORTHOGONALITY = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Target:
    """One matrix to approximate: `weight [M, N]`, the moment `c [N, N]`, the metric `g [M, M]` or None for I."""

    weight: torch.Tensor
    c: torch.Tensor
    g: torch.Tensor | None
    max_rank: int


@dataclass(frozen=True)
class _Square:
    """A target brought to its square part: `A W = Q R` with `R [K, N]`, and what leads back."""

    target: Target
    r: torch.Tensor
    a: torch.Tensor | None = None  # upper triangular [M, M], where the metric was factored
    q: torch.Tensor | None = None  # orthonormal [M, K], where one was computed; `A⁻¹ Q` where `a` is None
    cheap: bool = False  # R is a Cholesky factor and Q was not computed

    def lift(self, u: torch.Tensor) -> torch.Tensor:
        """Eigenvectors `[K, R]` of the square problem, brought to `left [M, R]`."""
        if self.cheap:
            return self.target.weight @ factoring.solve_triangular(self.r, u, upper=True)
        u = u if self.q is None else self.q @ u
        return u if self.a is None else factoring.solve_triangular(self.a, u, upper=True)


def solve(targets: Sequence[Target]) -> list[Factors]:
    """left `A⁻¹ U_r`, right `U_rᵀ A W`, energies the eigenvalues of `A W C Wᵀ Aᵀ`.

    A tall `W` (M > N) is first brought to its square part, `A W = Q R`: the eigenvectors are `Q Û` with `Û` those of
    `R C Rᵀ [N, N]`. `R` is the Cholesky factor of `Wᵀ G W`, several times cheaper than a QR; the orthogonality of each
    result is checked, and where it falls short, as for a condition beyond 1e3, it is factored a second time
    (CholeskyQR2, arXiv 1509.07222), and by a Householder QR where that falls short too.
    (**choice**: method 3 suggests `U = W S V / sigma`, which loses orthogonality where sigma is small.)

    A GPU does the check before the eigenproblem, which costs it a product; a CPU after it, on the result, where it
    costs nothing more, and what falls short costs a second eigenproblem.

    Raises torch.linalg.LinAlgError when a metric is not positive definite.
    """
    squares = [_square(target) for target in targets]
    for i, square in enumerate(squares):
        if square.cheap and _checks_first(square.r.device):
            squares[i] = _orthonormalized(square, checked=False)
    factors = _solve(squares)
    for i, square in enumerate(squares):
        if square.cheap and not _checks_first(square.r.device) and not _orthonormal(factors[i].left, square.target.g):
            factors[i : i + 1] = _solve([_orthonormalized(square, checked=True)])
    return factors


def _checks_first(device: torch.device) -> bool:
    return has_queues(device)


def _orthonormalized(square: _Square, *, checked: bool) -> _Square:
    """A cheap square as it is where its `Q = A W R⁻¹` is orthonormal, unless `checked` denied it; else one whose Q is.

    `QᵀQ = SᵀS`, and then `Q S⁻¹` and `S R` take the places of Q and R.
    """
    target = square.target
    basis = factoring.solve_triangular(square.r, target.weight, upper=True, left=False)  # A⁻¹ Q
    inner = _inner(basis, target.g)
    # Eigenvectors turn the error, by which an entry can grow to the norm of all of them.
    if not checked and bool(_error(inner).norm() <= ORTHOGONALITY[inner.dtype]):
        return square
    s, failed = factoring.cholesky_ex(inner, upper=True)
    if not bool(failed):
        basis = factoring.solve_triangular(s, basis, upper=True, left=False)
        if _orthonormal(basis, target.g):
            return _Square(target, s @ square.r, q=basis)
    return _householder(target)


def _solve(squares: Sequence[_Square]) -> list[Factors]:
    factors = []
    for square, (energy, u) in zip(squares, eigh_descending([_output(square) for square in squares]), strict=True):
        u = u[:, : square.target.max_rank]
        factors.append(Factors(square.lift(u), u.T @ square.r, energy, damping=0.0))
    return factors


def _output(square: _Square) -> torch.Tensor:
    output = square.r @ square.target.c @ square.r.T
    return (output + output.T) / 2  # the two products round differently


def _square(target: Target) -> _Square:
    weight, g = target.weight, target.g
    if weight.shape[0] <= weight.shape[1]:
        a = None if g is None else factoring.cholesky(g, upper=True)
        return _Square(target, weight if a is None else a @ weight, a)
    r, failed = factoring.cholesky_ex(_inner(weight, g), upper=True)
    return _householder(target) if bool(failed) else _Square(target, r, cheap=True)


def _householder(target: Target) -> _Square:
    a = None if target.g is None else factoring.cholesky(target.g, upper=True)
    q, r = factoring.qr(target.weight if a is None else a @ target.weight)
    return _Square(target, r, a, q)


def _orthonormal(left: torch.Tensor, g: torch.Tensor | None) -> bool:
    error = _error(_inner(left, g))
    return bool(error.abs().max() <= ORTHOGONALITY[error.dtype])  # False for NaN


def _inner(a: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
    """`aᵀ g a`."""
    return gram(a) if g is None else a.T @ (g @ a)


def _error(inner: torch.Tensor) -> torch.Tensor:
    return inner - torch.eye(len(inner), dtype=inner.dtype, device=inner.device)


def gram(a: torch.Tensor) -> torch.Tensor:
    """`aᵀ a [N, N]` of `a [M, N]`, exactly symmetric; half the work of the product."""
    result, total = a.new_zeros((a.shape[1], a.shape[1])), a.new_zeros(a.shape[1])
    ops.gram_accumulate_(result, total, a)
    return result


def damped(matrix: torch.Tensor, eps: float) -> torch.Tensor:
    """`matrix [D, D] + eps * mean diagonal * I`; with an all-zero diagonal the identity (no direction is known)."""
    scale = matrix.diagonal().mean()
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return eye if scale == 0 else matrix + eps * scale * eye
