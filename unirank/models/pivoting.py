"""The pivoted form: a rank-R matrix in `R (M + N - R)` parameters (method 9; PIFA, ICML 2025, arXiv 2501.19090)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unirank.models.factoring import one_thread

# |A| is at most this: the pivot rows are swapped until no other row is larger in any of them. (choice: 1 is the least
# that can be had; a little above it the swaps are few)
LIMIT = 1.1


@dataclass(frozen=True)
class Pivoted:
    """`W'[order[:R]] = b`, `W'[order[R:]] = a b`.

    Attributes:
        a: `[M - R, R]`.
        b: `[R, N]`, the pivot rows.
        order: int64 `[M]`, rows, the R pivots first; both parts ascend.
    """

    a: torch.Tensor
    b: torch.Tensor
    order: torch.Tensor


@torch.no_grad()
def pivot(left: torch.Tensor, right: torch.Tensor) -> Pivoted:
    """The pivoted form of `left [M, R] @ right [R, N]`, `R < M`, in their dtype; computed in float64.

    Where that dtype is 16 bits wide, `a` is fitted by least squares to `b` as it was rounded. The pivots depend on
    `left @ right` alone up to ties, for `a` does: the method's QR of `right` is not needed.
    """
    rank, dtype = left.shape[1], left.dtype
    with one_thread(left.device):
        a, order = dominant_rows(left.double())
        pivots = left.double()[order[:rank]] @ right.double()
        b = pivots.to(dtype)
        if dtype.itemsize == 2:
            a = _fitted(a @ pivots, b.double(), a)
    return Pivoted(a.to(dtype), b, order)


def dominant_rows(left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R rows of `left` float64 `[M, R]` from which all others follow: `left[others] = a left[rows]`, `|a| <= LIMIT`.

    Starts from the pivots of an LU decomposition and swaps a row while that enlarges the volume by more than `LIMIT`
    (Goreinov et al., "How to find a good submatrix", 2010). `a` comes from the unit triangle of the LU, so a `left` of
    lower rank is no special case.

    Returns a `[M - R, R]` and order int64 `[M]`, the R rows first; both parts ascend.
    """
    m, rank = left.shape
    lu, swaps, _ = torch.linalg.lu_factor_ex(left)
    rows = list(range(m))
    for position, other in enumerate(swaps.tolist()):
        rows[position], rows[other - 1] = rows[other - 1], rows[position]
    order = torch.tensor(rows, device=left.device)
    a = torch.linalg.solve_triangular(lu[:rank], lu[rank:].clone(), upper=False, left=False, unitriangular=True)
    while a.numel():
        i, j = divmod(int(a.abs().argmax()), rank)
        value = a[i, j].clone()
        if abs(float(value)) <= LIMIT:
            break
        # Row i becomes a pivot in the place of the j-th: left[j] = (left[i] - the rest of row i) / value.
        column, row = a[:, j].clone(), a[i].clone()
        row[j] -= 1
        a -= torch.outer(column, row / value)
        a[i] = -(row / value)
        a[i, j] = 1 / value
        order[[j, rank + i]] = order[[rank + i, j]]
    first, second = order[:rank].sort(), order[rank:].sort()
    return a[second.indices][:, first.indices], torch.cat([first.values, second.values])


def _fitted(rows: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """`a` with `a b` nearest to `rows`, by the normal equations; as it was where `b` lost its full rank to rounding."""
    factor, failed = torch.linalg.cholesky_ex(b @ b.T)
    if bool(failed):
        return a
    fitted = torch.cholesky_solve(b @ rows.T, factor).T
    return fitted if bool(fitted.isfinite().all()) else a
