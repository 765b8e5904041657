"""Curves of made-up matrices."""

from __future__ import annotations

import torch

from unirank.planning.allocator.curves import Curve


def curve_of(power: float, size: float = 1.0) -> Curve:
    ranks = torch.arange(1, 41)
    left = torch.linspace(1, 0, 40, dtype=torch.float64)
    return Curve(ranks, 10 * ranks, size * left**power)
