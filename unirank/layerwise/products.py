"""Sums over tokens of outer products of two different streams; those of one stream are `ops.gram_accumulate_`."""

from __future__ import annotations

import torch

# Rows whose products are summed in the dtype of the multiplication; as many as the chunks of `ops.gram_accumulate_`.
ROWS = 2048

# For few outputs a BLAS may add one product after the other, which rounds up to twenty times as much as its sums in
# blocks do (2.7e-6 of 2048 bfloat16 products, measured on an AMD CPU). Below this many a CPU multiplies in float64.
_NARROW = 16

# Rows of a sum that are widened to float64 together: they stay in a core's cache from the product to the sum.
_WIDENED = 128
_WIDENED_ON_GPU = 1 << 25  # entries: 256 MiB, of which a GPU needs few (**choice**)


def cross_moment(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`Σ_t x_t y_tᵀ`, float64 `[M, N]`, of `x [T, M]` and `y [T, N]`, floating, of one dtype.

    Half precision is multiplied in float32 (float64, and on a CPU fewer than 16 channels, in float64), a block of rows
    at a time, so that neither an outlier overflows nor a copy of all tokens is made; blocks are added in float64. A
    GPU's tensor cores take half precision as it is and add in float32: a product of two 16-bit numbers is exact there.
    """
    total = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    add_cross_moment_(total, x, y)
    return total


def add_cross_moment_(
    total: torch.Tensor, x: torch.Tensor, y: torch.Tensor, squares: torch.Tensor | None = None
) -> None:
    """Add `cross_moment(x, y)` to `total [M, N]`, and the sums of its squared rows to `squares [M]`; both float64."""
    products = (_product(a, b) for a, b in zip(x.split(ROWS), y.split(ROWS), strict=True))
    if squares is not None and len(x) > ROWS:  # squares are of the sum over all rows
        products = iter([cross_moment(x, y)])
    at_once = max(_WIDENED, _WIDENED_ON_GPU // max(1, total.shape[1])) if total.is_cuda else _WIDENED
    wide = torch.empty((min(at_once, len(total)), total.shape[1]), dtype=torch.float64, device=total.device)
    for product in products:
        for first in range(0, len(total), at_once):
            rows = slice(first, first + at_once)
            block = wide[: len(product[rows])].copy_(product[rows])
            total[rows] += block
            if squares is not None:
                squares[rows] += block.square_().sum(1)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`xᵀ y`, in float32; of float64, and on a CPU for few outputs, in float64."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        # Since torch 2.8, for CUDA and XPU, these two dtypes and float32 alone; a CPU has no such product.
        return torch.mm(x.T, y, out_dtype=torch.float32)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not x.is_cuda and min(x.shape[1], y.shape[1]) < _NARROW:
        dtype = torch.float64
    return x.to(dtype).T @ y.to(dtype)
