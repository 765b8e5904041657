"""Parameters, bytes and operations of a compressed model, from its ranks alone: no model is compressed for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unirank.compression.quantization import groups_of
from unirank.models.bits import Bits, layout, scale_dtype, stored_shape
from unirank.models.low_rank import count_parameters
from unirank.models.structure import weight_of
from unirank.models.targets import has_bias
from unirank.types import DENSE, ExpertSpec, Form, LinearSpec, LoadedModel, Rank

_GUARD = 8  # bytes of the guard that a low-rank or quantised linear has in the place of a weight
_PLACE = 4  # bytes of a row's place in the pivoted form
FLOATS = ("float32", "bfloat16")
WHOLE: Mapping[str, Bits] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Sizes:
    """What a dense model is made of, as far as sizes go. Counted once, of the model as it was loaded.

    Attributes:
        linears: the targets.
        biased: names of those that have a bias in the dense model.
        parameters: of the whole dense model, tied ones once.
        rest: floats of a checkpoint that are no target's weight: embeddings, head, norms, biases, buffers; tied once.
        rest_bytes: bytes of what is no float.
        head: weights of the matrix product that makes logits, tied or not.
        dtype: of the model as it was loaded.
    """

    linears: tuple[LinearSpec, ...]
    biased: frozenset[str]
    parameters: int
    rest: int
    rest_bytes: int
    head: int
    dtype: torch.dtype

    @classmethod
    def of(cls, loaded: LoadedModel) -> Sizes:
        """Counted from a dense model, also a streamed one."""
        model: Any = loaded.model
        weights = {id(spec.stored_in(model)) for spec in loaded.linears}
        state = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        others = [tensor for key, tensor in state.items() if key not in weights]
        floats = [tensor for tensor in others if tensor.is_floating_point()]
        head = model.get_output_embeddings()
        return cls(
            linears=loaded.linears,
            biased=frozenset(spec.name for spec in loaded.linears if has_bias(model, spec)),
            parameters=count_parameters(model),
            rest=sum(tensor.numel() for tensor in floats),
            rest_bytes=sum(tensor.nbytes for tensor in others if not tensor.is_floating_point()),
            head=0 if head is None else weight_of(head).numel(),
            dtype=model.dtype,
        )

    @property
    def targets(self) -> int:
        """Weight parameters of the targets, dense."""
        return sum(spec.params for spec in self.linears)

    def added(self, ranks: Mapping[str, Rank], adds_bias: bool) -> int:
        """Parameters of biases that low-rank linears have and the dense ones have not."""
        if not adds_bias:
            return 0
        low = [spec for spec in self.linears if ranks[spec.name] != DENSE and spec.name not in self.biased]
        stacks = {(spec.module, spec.parameter) for spec in low if isinstance(spec, ExpertSpec)}
        experts = (spec for spec in self.linears if isinstance(spec, ExpertSpec))
        count = sum(spec.m for spec in low if not isinstance(spec, ExpertSpec))
        # A stack of which one matrix gets a bias has one for each.
        return count + sum(spec.m for spec in experts if (spec.module, spec.parameter) in stacks)

    def parameters_at(self, ranks: Mapping[str, Rank], form: Form, *, adds_bias: bool = False) -> int:
        """Parameters of the whole model at these ranks, as `EvalReport.parameters` counts them.

        Args:
            ranks: of every target, canonical (see `RankPlan`).
            form: in which low-rank matrices are stored.
            adds_bias: whether low-rank linears get a bias where the dense ones have none (see `adds_bias`).
        """
        used = sum(spec.rank_cost(ranks[spec.name], form) for spec in self.linears)
        return self.parameters - self.targets + used + self.added(ranks, adds_bias)

    def flops(self, used: int) -> int:
        """Operations of the matrix products for one token: two a weight, `used` in the targets, and in the head."""
        return 2 * (used + self.head)

    def weight_bytes(self, ranks: Mapping[str, Rank], form: Form, kind: str, *, adds_bias: bool = False) -> int:
        """Bytes of a checkpoint's tensors, tied ones once; its files have a few thousand more, of their headers.

        Args:
            ranks, form, adds_bias: as in `parameters_at`.
            kind: "float32", "bfloat16" or another float of torch; or "int8", "int4", as `unirank.quantize` writes them
                where nothing is said about groups, with the rest in the model's own dtype. Of a model that nothing was
                removed from, which `quantize` leaves to torchao, the decoder's linears are counted by the same rules.
        """
        if kind in WHOLE:
            cost, width = _Whole(*groups_of(WHOLE[kind], None, form), self.dtype), self.dtype.itemsize
        else:
            width = getattr(torch, kind).itemsize
            cost = _Floats(width)
        size = self.rest_bytes + width * (self.rest + self.added(ranks, adds_bias))
        stacks: set[tuple[str, str]] = set()
        for spec in self.linears:
            rank = ranks[spec.name]
            if rank == DENSE:
                size += cost(spec.m, spec.n)
                continue
            r = int(rank)
            pivoted = form == "pivoted"
            if isinstance(spec, ExpertSpec):
                stacks.add((spec.module, spec.parameter))
            else:
                size += _GUARD
            size += cost(r, spec.n) + cost(spec.m - r if pivoted else spec.m, r) + _PLACE * spec.m * pivoted
        return size + _GUARD * len(stacks)

    def table(self, ranks: Mapping[str, Rank], form: Form, *, adds_bias: bool = False) -> dict[str, int]:
        """`weight_bytes` by kind."""
        return {kind: self.weight_bytes(ranks, form, kind, adds_bias=adds_bias) for kind in (*FLOATS, *WHOLE)}


@dataclass(frozen=True)
class _Floats:
    """Bytes of a matrix of floats."""

    width: int

    def __call__(self, rows: int, columns: int) -> int:
        return rows * columns * self.width


@dataclass(frozen=True)
class _Whole:
    """Bytes of a `QuantizedLinear`: numbers, scales, guard."""

    bits: Bits
    group_size: int | None
    dtype: torch.dtype

    def __call__(self, rows: int, columns: int) -> int:
        bits, group = layout(self.bits, self.group_size, columns)
        _, (m, n) = stored_shape(bits, rows, columns)
        return m * n + rows * (columns // group) * scale_dtype(self.dtype).itemsize + _GUARD
