"""Clip the tokens of a linear's input to a multiple of the usual length, so that a few do not make its moments.

Language models give a handful of tokens (the first of a window, delimiters) hundreds or thousands of times the length
of the others at the inputs of some linears. Squared, one such token outweighs all the others together, and a second
moment over them says that one direction holds all there is (measured: docs/experiments.md).
"""

from __future__ import annotations

import torch

from unirank.layerwise.products import ROWS


def clip_factors(x: torch.Tensor, clip: float) -> torch.Tensor | None:
    """What every token is to be multiplied with, so that none is longer than `clip` times the median token.

    `min(1, clip * median |x_s| / |x_t|)`, the median over the tokens that are not zero, the lower one of two in the
    middle (**choice**). A token with NaN or infinity keeps factor 1, so that whoever sums the tokens finds it.

    Args:
        x: tokens of one batch, `[T, N]`, floating.
        clip: multiple of the median; 0 clips nothing.

    Returns float64 `[T]`, or None where nothing is longer.
    """
    if clip == 0 or len(x) == 0:
        return None
    # Float64, for an outlier's square overflows in float32; in blocks, so that no float64 copy of all tokens is made.
    parts = x.tensor_split(-(-len(x) // ROWS))
    norms = torch.cat([torch.linalg.vector_norm(part.to(torch.float64), dim=1) for part in parts])
    seen = norms[(norms > 0) & norms.isfinite()]
    if len(seen) == 0:
        return None
    limit = clip * seen.median()
    factors = torch.where((norms > limit) & norms.isfinite(), limit / norms, 1.0)
    return factors if bool((factors < 1).any()) else None


def scaled(x: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """`x [T, N]` with its rows times `factors [T]`, in the dtype of `x`. Rows of factor 1 keep their bits.

    None gives `x` itself.
    """
    if factors is None:
        return x
    rows = (factors != 1).nonzero().squeeze(1)
    result = x.clone()
    result[rows] = (x[rows].to(torch.float64) * factors[rows, None]).to(x.dtype)
    return result


def clipped(x: torch.Tensor, clip: float) -> torch.Tensor:
    """`x [T, N]` with no token longer than `clip` times the median one; see `clip_factors`."""
    return scaled(x, clip_factors(x, clip))
