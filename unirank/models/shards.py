"""A checkpoint written shard by shard, by a process that never holds more of it than one shard."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel

from unirank.models.file_names import FileTensors
from unirank.models.streamed import trim
from unirank.types import Paging

SHARD_BYTES = 2**30


def save_model(model: PreTrainedModel, pages: Paging | None, folder: Path) -> None:
    """Write weights, configuration and what else `save_pretrained` writes; the bytes are the same with and without
    `pages`.

    Raises OSError or SafetensorError when the disk refuses.
    """
    if pages is None:
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    else:
        save_shards(model, pages, folder)


def save_shards(model: PreTrainedModel, pages: Paging, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write what `model.save_pretrained(folder)` writes, for a model whose meta tensors are read by `pages`.

    A shard ends before it would exceed `shard_bytes`; a tensor larger than that gets a shard of its own. Raises OSError
    or SafetensorError when the disk refuses.
    """
    left_out = {*(getattr(model, "all_tied_weights_keys", None) or ()), *(model._keys_to_ignore_on_save or ())}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}

    def read(name: str) -> torch.Tensor:
        return pages.tensor(name) if tensors[name].is_meta else tensors[name]

    model.save_pretrained(folder, state_dict={})  # all but the weights
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    written = FileTensors(model, tensors, read)
    split = split_torch_state_dict_into_shards(
        written.empty, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file_name, group in split.filename_to_tensors.items():
        # The shard gets no name: a name would keep it in memory while the next one is read.
        save_file(
            {key: written.take(key).detach().to("cpu").contiguous() for key in group},
            folder / file_name,
            metadata={"format": "pt"},
        )
        trim()
    if split.is_sharded:
        counted = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": counted, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
