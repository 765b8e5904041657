"""Effective ranks, and rank correlation with a permutation test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unirank.errors import InputError

LEVEL = 0.05  # of significance, for verdicts
LEAST = 3  # pairs; two points always lie on a line
_EXACT = 7  # up to here all n! orders are tried


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho and its two-sided permutation p-value."""

    rho: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether `p < LEVEL`."""
        return self.p < LEVEL

    @property
    def verdict(self) -> str:
        """What the correlation of cosine and effective rank says about the claim, at `LEVEL`."""
        if not self.significant:
            return "no relation seen"
        return "confirmed: higher cosine, lower rank" if self.rho < 0 else "denied: higher cosine, higher rank"


def spearman(x: Sequence[float], y: Sequence[float], *, permutations: int = 10_000, seed: int = 0) -> Correlation:
    """Spearman's rank correlation (ties get average ranks) and its two-sided p-value by permutation.

    Up to 7 pairs all orders are tried and p is exact; beyond, `p = (1 + hits) / (1 + permutations)` (Phipson and Smyth
    2010), a hit being a random order whose |rho| is at least the one seen.

    Raises InputError for fewer than 3 pairs, unequal lengths, values that are not finite, and x or y all equal (rho is
    not defined then).
    """
    if len(x) != len(y) or len(x) < LEAST:
        raise InputError(f"Spearman's rho needs at least {LEAST} pairs, got {len(x)} and {len(y)} values.")
    if permutations < 1:
        raise InputError(f"permutations = {permutations} is not legal; at least 1 is needed.")
    a, b = _centred_ranks(x), _centred_ranks(y)
    scale = math.sqrt(int(a.square().sum())) * math.sqrt(int(b.square().sum()))
    if scale == 0:
        raise InputError("Spearman's rho is not defined where all values are equal.")
    seen = int((a * b).sum())
    count = len(x)
    if count <= _EXACT:
        orders = torch.tensor(list(itertools.permutations(range(count))))
    else:
        generator = torch.Generator().manual_seed(seed)
        orders = torch.rand(permutations, count, dtype=torch.float64, generator=generator).argsort(stable=True, dim=1)
    # Whole numbers, so that orders with equal rho compare as equal.
    hits = int(((b[orders] * a).sum(1).abs() >= abs(seen)).sum())
    p = hits / len(orders) if count <= _EXACT else (1 + hits) / (1 + permutations)
    return Correlation(min(1.0, max(-1.0, seen / scale)), p)


def _centred_ranks(values: Sequence[float]) -> torch.Tensor:
    """Twice the average rank minus its mean: whole numbers, int64 `[n]`."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if not tensor.isfinite().all():
        raise InputError("Spearman's rho needs finite values.")
    _, inverse, counts = tensor.unique(return_inverse=True, return_counts=True)
    return (2 * counts.cumsum(0) - counts + 1)[inverse] - (len(tensor) + 1)
