"""Shrinkage of input moments: what tokens say of two channels together is worth less than what they say of each.

A moment of N channels has N (N + 1) / 2 numbers. Few tokens know most of them badly, and many tokens of one text know
them for that text alone. So the covariance is drawn towards its own diagonal ("diagonal, unequal variances" of Schäfer
and Strimmer, 2005, after Ledoit and Wolf, 2004), by a share that the user gives (**choice**: theirs follows from the
tokens, which say nothing about other texts; docs/experiments.md).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from unirank.types import Moment


def shrink_cross_(second: torch.Tensor, first: torch.Tensor, other: torch.Tensor, share: float) -> None:
    """`(1 - share) E[x yᵀ] + share E[x] E[y]ᵀ`, in the place of `second`, `E[x yᵀ] [N, N]`.

    Args:
        first, other: E[x] and E[y], `[N]`. Where they are the same, what was symmetric stays so to the bit.
        share: in [0, 1].
    """
    scale = math.sqrt(share)
    second.mul_(1 - share).add_(torch.outer(scale * first, scale * other))


def shrink_(second: torch.Tensor, first: torch.Tensor, share: float) -> None:
    """`(1 - share) S + share diag(S) + mu muᵀ` in the place of `S + mu muᵀ [N, N]`, `mu` `first [N]`.

    The energy of every channel, and so the trace, stay to the bit.
    """
    diagonal = second.diagonal().clone()
    shrink_cross_(second, first, first, share)
    second.diagonal().copy_(diagonal)


def shrink_all(moments: dict[str, Moment], share: float) -> dict[str, Moment]:
    """`moments` with new, shrunk ones in their places, made one after the other; with `share` 0 as they were."""
    for name, moment in moments.items() if share else ():
        c = moment.c.clone()  # experts may share one, and the next part's begin from it
        shrink_(c, moment.mean, share)
        moments[name] = dataclasses.replace(moment, c=c)
    return moments
