"""What passes between layers in the gradient pass, forward and backward: on the disk, or in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from unirank.analysis.hidden import Place
from unirank.analysis.store import AnalysisStore, Scratch
from unirank.layerwise.recording import Streams


class Between(Protocol):
    """Hidden states that enter a layer (`forward`), and their gradients at its input (`backward`)."""

    def has(self, kind: Scratch, layer: int) -> bool: ...

    def write(self, kind: Scratch, layer: int, batches: Sequence[torch.Tensor]) -> None:
        """Keep one tensor `[B, T, D]` a batch until `remove`."""
        ...

    def read(self, kind: Scratch, layer: int) -> list[torch.Tensor]:
        """What `write` kept, on the model's device."""
        ...

    def remove(self, kind: Scratch, layer: int) -> None: ...


@dataclass
class OnDisk:
    """In files of the store, whole and hashed: a pass that was killed goes on from them."""

    store: AnalysisStore
    device: torch.device

    def has(self, kind: Scratch, layer: int) -> bool:
        return self.store.has_scratch(kind, layer)

    def write(self, kind: Scratch, layer: int, batches: Sequence[torch.Tensor]) -> None:
        self.store.write_scratch(kind, layer, batches)

    def read(self, kind: Scratch, layer: int) -> list[torch.Tensor]:
        return self.store.read_scratch(kind, layer, self.device)

    def remove(self, kind: Scratch, layer: int) -> None:
        self.store.remove_scratch(kind, layer)


@dataclass
class InMemory:
    """Where `place` says: on the device, in the host's page-locked memory, or in mapped files that end with us."""

    place: Place
    device: torch.device
    _kept: dict[tuple[Scratch, int], Streams] = field(default_factory=dict)

    def has(self, kind: Scratch, layer: int) -> bool:
        return (kind, layer) in self._kept

    def write(self, kind: Scratch, layer: int, batches: Sequence[torch.Tensor]) -> None:
        probe = torch.empty(0, device=self.device)  # says where batches are brought
        streams = Streams([], probe, self.place.folder, self.place.host)
        for position, batch in enumerate(batches):
            streams.put(position, batch)
        self._kept[kind, layer] = streams

    def read(self, kind: Scratch, layer: int) -> list[torch.Tensor]:
        return list(self._kept[kind, layer].entering())

    def remove(self, kind: Scratch, layer: int) -> None:
        self._kept.pop((kind, layer), None)
