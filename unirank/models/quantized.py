"""`QuantizedLinear`: a linear whose weights are whole numbers of 8 or 4 bits with scales.

The numbers are chosen and multiplied by torchao (weight-only, symmetric). Ours is where they lie: in plain buffers,
which `state_dict`, safetensors, moves and casts take as they are. torchao's tensor is built on them when it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from unirank.models.bits import Bits, scale_dtype, stored_shape, unpack

# What torchao calls them.
KINDS: dict[Bits, torch.dtype] = {8: torch.int8, 4: torch.int4}  # pyright: ignore[reportAttributeAccessIssue]


class QuantizedLinear(nn.Module):
    """`y = x W^T + bias`, `W[o, i] = number[o, i] scale[o, i // group]`.

    Attributes:
        quantized: the numbers; of 8 bits int8 `[M, N]`, of 4 bits uint8 `[M, ceil(N / 2)]` (`models.bits.pack`).
        scale: `[M, N / group]`; bfloat16 of a bfloat16 model, else float32.
        bias: `[M]` in the model's dtype, or None.
        weight: int64 `[1]`, the bits: a guard, as in `LowRankLinear`.
        bits: of this matrix.
        group: weights that share a scale; N where a row has one.
    """

    quantized: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: Bits,
        group: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits: Bits = bits
        self.group = group
        kind, shape = stored_shape(bits, out_features, in_features)
        self.register_buffer("quantized", torch.zeros(shape, dtype=kind, device=device))
        scales = torch.zeros(out_features, in_features // group, dtype=scale_dtype(dtype), device=device)
        self.register_buffer("scale", scales)
        own = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)
        self.register_buffer("weight", torch.full((1,), bits, dtype=torch.int64, device=device))

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """torchao's tensor `[M, N]` that multiplies in `dtype`. Of 8 bits it is no copy."""
        # Not above, for torchao is an extra.
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

        numbers = self.quantized if self.bits == 8 else unpack(self.quantized, self.in_features)
        if self.bits == 8 and dtype != torch.float16:
            return Int8Tensor(numbers, self.scale, [1, self.group], dtype)
        # That one sums products with the whole numbers and scales the sum, for which the range of float16 is too small.
        zeros = torch.zeros_like(self.scale, dtype=torch.int8)
        return IntxUnpackedToInt8Tensor(numbers, self.scale, zeros, KINDS[self.bits], (1, self.group), dtype, None)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[M, N]` as floats of `dtype`."""
        weight: Any = self.weight_in(dtype)
        return weight.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., N]` -> `[..., M]`."""
        bias: Any = self.bias
        return F.linear(x, self.weight_in(x.dtype), None if bias is None else bias.to(x.dtype))

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, bits={self.bits}, group={self.group}"
