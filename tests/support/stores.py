"""What the tests of analysis stores look at, and how they damage them."""

from __future__ import annotations

from pathlib import Path

from unirank.analysis.store import MANIFEST


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip(file: Path, position: int) -> None:
    """Change one bit of the byte at `position`, counted from the end."""
    data = bytearray(file.read_bytes())
    data[-position] ^= 4
    file.write_bytes(data)


def passing(folder: Path) -> list[str]:
    """Files that must be gone when nothing needs them any more."""
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith((MANIFEST, "layer-", "gradient-")))
