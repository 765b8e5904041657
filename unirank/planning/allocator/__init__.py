"""Allocators, one file each. To add one: write the file, add its line here and its row to docs/method.md."""

from __future__ import annotations

from unirank.errors import InputError
from unirank.planning.allocator import (
    ara,
    bi,
    curvature,
    d_rank,
    lems,
    softmax,
    svdllm_v2,
    swift,
    tolerance,
    typed,
    uniform,
    unirank,
    zs_svd,
)
from unirank.planning.allocator.base import Allocator, Request, Workbench

_REGISTRY: dict[str, Allocator] = {
    module.ALLOCATOR.name: module.ALLOCATOR
    for module in (
        unirank,
        curvature,
        zs_svd,
        uniform,
        typed,
        d_rank,
        svdllm_v2,
        tolerance,
        bi,
        softmax,
        swift,
        lems,
        ara,
    )
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
