"""Where hidden states are while an analysis runs: on the model's device, in the host's memory, or in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from unirank.queues import CALLS, PageLocked, has_queues
from unirank.types import LoadedModel


@dataclass(frozen=True)
class Place:
    """Where the hidden states between two layers are; neither `folder` nor `host` is the model's device.

    Attributes:
        folder: in mapped files of this directory.
        host: in the host's page-locked memory, beside a GPU.
        keep: what enters the next layer is also written into the store, so that a run that was killed goes on from
            there; else it runs the finished layers again, without their statistics.
    """

    folder: Path | None
    host: PageLocked | None
    keep: bool


def place_of(
    loaded: LoadedModel, windows: torch.Tensor, folder: Path, *, limit: int | None, keep: bool | None
) -> Place:
    """Where the hidden states of `windows`, int64 `[W, T]`, have room.

    They stay on the model's device where they take at most a quarter of what is free there. Else they go from a GPU to
    the host, by the same rule, or else into mapped files. A `limit` in bytes takes the place of both quarters, and what
    is larger goes into files. `keep` is as in `Place`; None is True on a CPU and False on a GPU, which runs a layer
    again in less time than a disk takes to write what enters it.
    """
    device = loaded.device
    gpu = has_queues(device)
    keep = not gpu if keep is None else keep
    needed = hidden_bytes(loaded, windows) * (2 if keep else 1)  # the writer holds a copy
    if needed <= (free_bytes(device) // 4 if limit is None else limit):
        return Place(None, None, keep)
    if gpu and limit is None and needed <= psutil.virtual_memory().available // 4:
        return Place(None, PageLocked(device), keep)
    return Place(folder, None, keep)


def hidden_bytes(loaded: LoadedModel, windows: torch.Tensor) -> int:
    """Of the hidden states between two layers."""
    embedding = loaded.model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    width = loaded.model.config.get_text_config().hidden_size
    return windows.numel() * width * embedding.element_size()


def free_bytes(device: torch.device) -> int:
    """Of the memory of `device`."""
    return CALLS.free(device) if has_queues(device) else psutil.virtual_memory().available
