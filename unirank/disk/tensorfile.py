"""Our safetensors files: written whole or not at all, with checksums of header and tensors that each reading checks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unirank.disk.files import write_atomically
from unirank.disk.hashing import sha256_tensors, sha256_text
from unirank.disk.strictjson import parse_object

_KEY = "unirank"
_SUMS = "sha256"
_HEADER_SUM = "header_sha256"
# What reading raises for a file that is missing, cut off or changed.
DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write one file; raises WriteError like `write_atomically`.

    The header goes into a single metadata entry, since safetensors writes several in random order and equal inputs
    must give equal bytes.
    """
    flat = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    sums = {name: _sum(name, tensor) for name, tensor in flat.items()}
    record = {**header, _SUMS: sums}
    metadata = {_KEY: _dumped({**record, _HEADER_SUM: sha256_text(_dumped(record))})}
    write_atomically(path, lambda temporary: save_file(flat, temporary, metadata=metadata))


class TensorFile:
    """An open file of `write_tensors`."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file, self._path = file, path
        self.header: dict[str, Any] = parse_object(file.metadata()[_KEY])
        if self.header.pop(_HEADER_SUM) != sha256_text(_dumped(self.header)):
            raise ValueError("its header has other values than were written")
        self._sums: Mapping[str, str] = self.header.pop(_SUMS)

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor `name`, or None where there is none."""
        return self[name] if name in self._sums else None

    def names(self) -> list[str]:
        return sorted(self._sums)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU. Raises ValueError when its bytes are not those that were written."""
        tensor = self._file.get_tensor(name)
        if _sum(name, tensor) != self._sums[name]:
            raise ValueError(f"{name} has other bytes than were written")
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Read a file of `write_tensors`. Raises one of `DAMAGE`, here or inside, when it is not what was written."""
    with safe_open(path, framework="pt") as file:
        yield TensorFile(file, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name. Raises like `open_tensors`."""
    with open_tensors(path) as file:
        return {name: file[name] for name in file.names()}


def _dumped(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _sum(name: str, tensor: torch.Tensor) -> str:
    return sha256_tensors([(name, tensor)])
