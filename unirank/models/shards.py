"""A checkpoint written shard by shard, by a process that never holds more of it than one shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from unirank.models.streamed import trim
from unirank.types import Paging

SHARD_BYTES = 2**30


def save_shards(model: PreTrainedModel, pages: Paging, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write what `model.save_pretrained(folder)` writes, for a model whose meta tensors are read by `pages`.

    A shard ends before it would exceed `shard_bytes`; a tensor larger than that gets a shard of its own. Raises OSError
    or SafetensorError when the disk refuses.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}

    def read(name: str) -> torch.Tensor:
        return pages.tensor(name) if tensors[name].is_meta else tensors[name]

    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    write_shards(sizes, read, folder, shard_bytes=shard_bytes)
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def write_shards(
    sizes: dict[str, int], read: Callable[[str], torch.Tensor], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write safetensors files and, if there are several, their index, named as transformers names them.

    Args:
        sizes: bytes of every tensor by name, in the order in which they are written.
        read: the tensor of a name; called once for each.
    """
    groups = list(_groups(sizes, shard_bytes))
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    for name, group in zip(names, groups, strict=True):
        # The shard gets no name: a name would keep it in memory while the next one is read.
        save_file(
            {key: read(key).detach().to("cpu").contiguous() for key in group}, folder / name, metadata={"format": "pt"}
        )
        trim()
    if len(groups) > 1:
        places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _groups(sizes: dict[str, int], limit: int) -> Iterable[list[str]]:
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group
