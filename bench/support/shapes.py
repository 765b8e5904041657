"""Shapes of real models, from their published configurations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A decoder: `hidden` D, MLP width, query and key-value widths (heads times head size), vocabulary."""

    layers: int
    hidden: int
    mlp: int
    query: int
    key_value: int
    vocabulary: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """`(M, N)` of the seven linears of a layer: q, k, v, o, gate, up, down."""
        d, f = self.hidden, self.mlp
        attention = ((self.query, d), (self.key_value, d), (self.key_value, d), (d, self.query))
        return (*attention, (f, d), (f, d), (d, f))

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of the distinct inputs of a layer: of q/k/v, o, gate/up, down."""
        return (self.hidden, self.query, self.hidden, self.mlp)

    def all_linears(self) -> Iterator[tuple[int, int]]:
        for _ in range(self.layers):
            yield from self.linears


MODELS = {
    "smollm2-135m": Model(30, 576, 1536, 576, 192, 49152),
    "llama-2-7b": Model(32, 4096, 11008, 4096, 4096, 32000),
    "llama-3-8b": Model(32, 4096, 14336, 4096, 1024, 128256),
    "llama-3-70b": Model(80, 8192, 28672, 8192, 1024, 128256),
    "qwen3-8b": Model(36, 4096, 12288, 4096, 1024, 151936),
    "gemma-3-4b": Model(34, 2560, 10240, 2048, 1024, 262208),
}
