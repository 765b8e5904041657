"""Our safetensors files: written whole or not at all, with checksums of header and tensors that each reading checks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unirank.disk.files import write_atomically
from unirank.disk.hashing import sha256_tensors, sha256_text
from unirank.disk.strictjson import Damaged, entry, parse_object
from unirank.errors import is_out_of_memory
from unirank.queues import has_queues, to_host

_KEY = "unirank"
_SUMS = "sha256"
_HEADER_SUM = "header_sha256"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write one file; raises WriteError like `write_atomically`.

    The header goes into a single metadata entry, since safetensors writes several in random order and equal inputs
    must give equal bytes. Tensors of a GPU come behind what the caller's queue holds (see `queues.to_host`).
    """
    flat: dict[str, torch.Tensor] = {}
    sums: dict[str, Future[str]] = {}
    # On a CPU the threads have other work meanwhile; what comes from a GPU is hashed by all of them while more comes.
    from_gpu = any(has_queues(tensor.device) for tensor in tensors.values())
    with ThreadPoolExecutor(torch.get_num_threads() if from_gpu else 1) as pool:
        for name, tensor in tensors.items():
            flat[name] = to_host(tensor)
            sums[name] = pool.submit(_sum, name, flat[name])
    record = {**header, _SUMS: {name: found.result() for name, found in sums.items()}}
    metadata = {_KEY: _dumped({**record, _HEADER_SUM: sha256_text(_dumped(record))})}
    write_atomically(path, lambda temporary: save_file(flat, temporary, metadata=metadata))


class TensorFile:
    """An open file of `write_tensors`."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.header: dict[str, Any] = parse_object(entry(file.metadata(), _KEY, str))
        if entry(self.header, _HEADER_SUM, str) != sha256_text(_dumped(_without(self.header, _HEADER_SUM))):
            raise Damaged("its header has other values than were written")
        self._sums: Mapping[str, str] = entry(self.header, _SUMS, dict)
        self.header = _without(self.header, _HEADER_SUM, _SUMS)

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor `name`, or None where there is none."""
        return self[name] if name in self._sums else None

    def names(self) -> list[str]:
        return sorted(self._sums)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU. Raises Damaged when it is not there, or its bytes are not those that were
        written."""
        if name not in self._sums:
            raise Damaged(f"it has no {name}")
        with _reading():
            tensor = self._file.get_tensor(name)
        if _sum(name, tensor) != self._sums[name]:
            raise Damaged(f"{name} has other bytes than were written")
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Read a file of `write_tensors`. Raises Damaged, here or where a tensor is asked for, when it is not what was
    written."""
    with _reading():
        file = safe_open(path, framework="pt")
    with file:
        yield TensorFile(file)


@contextmanager
def _reading() -> Iterator[None]:
    """Around calls of safetensors, and of nothing of ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise Damaged(str(error)) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name. Raises like `open_tensors`."""
    with open_tensors(path) as file:
        return {name: file[name] for name in file.names()}


def _without(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def _dumped(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _sum(name: str, tensor: torch.Tensor) -> str:
    return sha256_tensors([(name, tensor)])
