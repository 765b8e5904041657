"""SHA-256 of texts, files and tensors, and what differs between two records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def sha256_text(text: str) -> str:
    """SHA-256 of the UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_files(directory: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    """SHA-256 of the files in `directory` that match `pattern`, by name."""
    return {file.name: _sha256_file(file) for file in sorted(directory.glob(pattern))}


def _sha256_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and raw bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(old: Any, new: Any, *, was: str = "store", path: str = "") -> list[str]:
    """What differs between two JSON records, in words; hashes only where nothing that can be read differs.

    `was` says where the old one is.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), was=was, path=f"{path}.{key}".lstrip("."))
        return [line for line in lines if "sha256" not in line] or lines
    short = [value[:12] if "sha256" in path and isinstance(value, str) else value for value in (old, new)]
    return [] if old == new else [f"{path} ({was}: {short[0]!r}, now: {short[1]!r})"]
