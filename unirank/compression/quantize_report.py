"""What quantising made of a compressed model, counted from its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from unirank import looks
from unirank.disk.strictjson import Damaged, entry
from unirank.errors import InputError
from unirank.models.bits import Bits, check_bits
from unirank.models.quantizing import quantized_linears, stored_bytes

_MOST = 2**63  # bytes that a record can count


@dataclass(frozen=True)
class QuantizeReport:
    """Bits and bytes, of the whole model: parameters and buffers, tied ones once.

    Attributes:
        bits: that were asked for.
        group_size: the most weights that share a scale; None where every row has one.
        matrices: that were quantised.
        of_8_bits: those of them that have 8 bits; with 4, those whose rows no group divides.
        bytes_before: of the same model with floats.
        bytes_after: as it is now.
    """

    bits: Bits
    group_size: int | None
    matrices: int
    of_8_bits: int
    bytes_before: int
    bytes_after: int

    def __repr__(self) -> str:
        size = "a row" if self.group_size is None else f"up to {self.group_size} weights"
        return looks.lines(
            f"QuantizeReport: {self.bits} bits, one scale for {size}; {self.matrices} matrices",
            f"{looks.megabytes(self.bytes_before)} to {looks.megabytes(self.bytes_after)}",
            f"{self.of_8_bits} matrices have 8 bits",
        )

    @classmethod
    def of(cls, model: PreTrainedModel, bits: Bits, group_size: int | None) -> QuantizeReport:
        """Counted from a quantised model; no weight is read."""
        linears, after, itemsize = quantized_linears(model).values(), stored_bytes(model), model.dtype.itemsize
        floats = sum(linear.in_features * linear.out_features * itemsize for linear in linears)
        own = sum(linear.quantized.nbytes + linear.scale.nbytes for linear in linears)
        of_8 = sum(linear.bits == 8 for linear in linears)
        return cls(bits, group_size, len(linears), of_8, after - own + floats, after)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> QuantizeReport:
        """Read `as_dict`'s result. Raises Damaged for anything else."""
        counts = {field.name: entry(record, field.name, int) for field in fields(cls)[2:]}
        for name, count in counts.items():
            if not 0 <= count < _MOST:
                raise Damaged(f"{name} is {str(count)[:80]}")
        try:
            bits, size = check_bits(record.get("bits"), record.get("group_size"))
        except InputError as error:
            raise Damaged(str(error).rstrip(".")) from error
        return cls(bits, size, **counts)

    def described(self) -> str:
        """Bits, groups and bytes in one line."""
        scales = "one scale a row"
        if self.group_size is not None:
            scales = f"one scale for up to {self.group_size} weights, or a row that no group divides"
        how = f"{self.bits} bits, {scales}"
        if self.bits == 4 and self.of_8_bits:
            how += f" ({self.of_8_bits} of {self.matrices} matrices, which have 8 bits)"
        return f"{how} (torchao); {self.bytes_before:,} to {self.bytes_after:,} bytes"
