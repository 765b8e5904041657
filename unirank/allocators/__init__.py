"""Allocators, one file each. To add one: write the file, add its line here and its row to docs/method.md."""

from __future__ import annotations

from unirank.allocators import curvature, uniform, unirank
from unirank.allocators.base import Allocator, Request, Workbench
from unirank.errors import InputError

_REGISTRY: dict[str, Allocator] = {
    allocator.name: allocator for allocator in (unirank.ALLOCATOR, uniform.ALLOCATOR, curvature.ALLOCATOR)
}


def allocators() -> tuple[str, ...]:
    """Names of all allocators."""
    return tuple(_REGISTRY)


def allocator(name: str) -> Allocator:
    """The allocator of that name; raises InputError with the legal names."""
    if name not in _REGISTRY:
        raise InputError(f"The allocator {name!r} does not exist; legal values: {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]


__all__ = ["Allocator", "Request", "Workbench", "allocator", "allocators"]
