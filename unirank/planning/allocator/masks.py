"""The parts that `ara` trains: staircases over components, and factors under a mask in the place of a linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from unirank.analysis.store import AnalysisStore
from unirank.models.structure import weight_of
from unirank.types import Form, LinearSpec

_SPREAD = 0.1  # of the D blocks: standard deviation of `a` at the start
_BISECTIONS = 60


@dataclass(frozen=True)
class Staircase:
    """`a = softmax(theta)`; component `i` in block `b(i)` has `mask_i = Σ_{d >= b(i)} a_d`: non-increasing, in [0, 1].

    The D blocks are equal shares of the components up to the rank at which the matrix is dense (**choice**: beyond it
    nothing is gained), so `a_d` is the weight of keeping the first `d + 1` blocks, and a one-hot `a` is a rank.

    Attributes:
        theta: float64 `[D]`, trained.
        block: int64 `[R]`, the block of each component.
    """

    theta: torch.Tensor
    block: torch.Tensor

    def mask(self) -> torch.Tensor:
        """float64 `[R]`; its sum is the expected rank."""
        suffix = self.theta.softmax(0).flip(0).cumsum(0).flip(0)
        return suffix.clamp(max=1.0)[self.block]  # the sum of all can round above 1

    @classmethod
    def start(cls, spec: LinearSpec, blocks: int, wanted: float, form: Form, device: torch.device) -> Staircase:
        """The staircase whose expected rank is `wanted`.

        `a` is a discretised normal distribution (**choice**), so that every step starts with a gradient; its mean is
        bisected, its standard deviation is a tenth of the blocks. Below one block the rank is one block.
        """
        count = spec.dense_rank(form)
        size = min(blocks, count)
        block = torch.arange(count) * size // count
        positions = torch.arange(size, dtype=torch.float64)

        def at(center: float) -> Staircase:
            return cls(-((positions - center) ** 2) / (2 * (_SPREAD * size) ** 2), block)

        low, high = -float(size), 2.0 * size
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if float(at(middle).mask().sum()) < wanted:
                low = middle
            else:
                high = middle
        theta = at((low + high) / 2).theta
        return cls(theta.to(device).requires_grad_(), block.to(device))


class MaskedFactors(nn.Module):
    """`y = (1 - gate) W_m x + gate W x + b`, `W_m = left diag(mask) right`: what `ara` puts in a linear's place.

    The gate, 0 below the ratio `near` and 1 at break-even, is the jump to the dense matrix made continuous
    (**choice**), so that the loss shows what the jump is worth. With the scheme `afm`, the bias of every rank
    (`(W - W_m) mean`) is part of it.

    Mask and gate, and their gradients, are float32 whatever the model's dtype (float64 in float64): bfloat16 has steps
    of 1/256 below 1, larger than a step of training, and a sum over windows in it stands still after some hundred.
    """

    mask: torch.Tensor
    gate: torch.Tensor

    def __init__(self, dense: nn.Module, left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor | None) -> None:
        super().__init__()
        self.dense, self.left, self.right = dense, left, right
        self._work = torch.promote_types(left.dtype, torch.float32)
        bias = dense.bias
        self.base = bias.detach() if isinstance(bias, torch.Tensor) else None
        self.shift: torch.Tensor | None = None
        if mean is not None:
            weight = weight_of(dense).detach()
            mean = mean.double().to(weight.device)
            lost = (weight.double() @ mean).to(weight.dtype)
            self.base = lost if self.base is None else self.base + lost
            self.shift = (right.double() @ mean).to(self._work)

    def set(self, mask: torch.Tensor, gate: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Take the values of `mask [R]` and `gate []`, and return each with the leaf that gathers its gradient.

        Both are at least float32.
        """
        pairs = []
        for name, tensor in (("mask", mask), ("gate", gate)):
            value = tensor.to(self.left.device, self._work)
            leaf = value.detach().clone().requires_grad_()
            leaf.grad = torch.zeros_like(leaf)
            setattr(self, name, leaf)
            pairs.append((value, leaf))
        return pairs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., N]` -> `[..., M]`."""
        inner = F.linear(x, self.right).to(self._work)
        if self.shift is not None:
            inner = inner - self.shift
        low = F.linear((inner * self.mask).to(x.dtype), self.left, self.base)
        if float(self.gate.detach()) == 0:  # it costs no second product; its gradient is 0 there anyway
            return low
        return torch.lerp(low.to(self._work), self.dense(x).to(self._work), self.gate).to(x.dtype)


def masked_factors(store: AnalysisStore, spec: LinearSpec, form: Form, dense: nn.Module) -> MaskedFactors:
    """The factors of `store` up to the dense rank, for the place of `dense`; `mask` and `gate` are still to be set."""
    weight = weight_of(dense)
    left, right = (factor.to(weight.device) for factor in store.factors(spec, spec.dense_rank(form)))
    return MaskedFactors(dense, left, right, store.input_mean(spec))
