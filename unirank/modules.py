"""`LowRankLinear`: what a compressed linear becomes, and where in memory its weights lie."""

from __future__ import annotations

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """`y = left(right(x))`: two inner linears, `right` N -> R without bias and `left` R -> M with the bias kept.

    peft can target the inner linears by name ("left", "right"). The persistent buffer `weight` (int64 `[1]`, the rank)
    is a guard: it takes the name of the dense weight that is gone, in a shape that does not fit it, so that a loader
    which does not know unirank stops with a shape mismatch where it would otherwise start from random weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.added_bias = False  # whether the bias is not the dense linear's
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.full((1,), rank, dtype=torch.int64, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., N]` -> `[..., M]`."""
        return self.left(self.right(x))

    def dense_weight(self) -> torch.Tensor:
        """The product `left @ right`, `[M, N]`."""
        return self.left.weight @ self.right.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


_ALIGNMENT = 64  # bytes: the widest vector of a CPU, and what MKL asks for


def align_weights(model: nn.Module) -> None:
    """Copy every CPU parameter that does not start on a 64-byte boundary to memory that does; values stay.

    Weights mapped from a file lie where the file's header put them, and BLAS adds in another order at another
    alignment. Without this, the same weights could give other last bits in another process.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()  # torch allocates on the boundary
