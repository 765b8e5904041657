"""Sums over tokens of outer products of two different streams; those of one stream are `ops.gram_accumulate_`."""

from __future__ import annotations

import torch

# Rows whose products are summed in the dtype of the multiplication; as many as the chunks of `ops.gram_accumulate_`.
ROWS = 2048


def cross_moment(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`Σ_t x_t y_tᵀ`, float64 `[M, N]`, of `x [T, M]` and `y [T, N]`, floating, of one dtype.

    Half precision is multiplied in float32 (float64 in float64), a block of rows at a time, so that neither an outlier
    overflows nor a copy of all tokens is made; blocks are added in float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    for a, b in zip(x.split(ROWS), y.split(ROWS), strict=True):
        total += a.to(dtype).T @ b.to(dtype)
    return total
