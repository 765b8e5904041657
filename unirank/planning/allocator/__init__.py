"""Allocators, one file each. To add one: write the file, add its line here and its row to docs/method.md.

A file is imported when its allocator is asked for, so that names cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from unirank.errors import InputError

if TYPE_CHECKING:
    from unirank.planning.allocator.base import Allocator

# Name -> file.
_REGISTRY = {
    "unirank": "unirank",
    "tied": "tied",
    "curvature": "curvature",
    "zs-svd": "zs_svd",
    "uniform": "uniform",
    "typed": "typed",
    "d-rank": "d_rank",
    "svdllm-v2": "svdllm_v2",
    "tolerance": "tolerance",
    "bi": "bi",
    "softmax": "softmax",
    "swift": "swift",
    "lems": "lems",
    "ara": "ara",
}


def allocators() -> tuple[str, ...]:
    """Names of all allocators."""
    return tuple(_REGISTRY)


def allocator(name: str) -> Allocator:
    """The allocator of that name; raises InputError with the legal names."""
    if name not in _REGISTRY:
        raise InputError(f"The allocator {name!r} does not exist; legal values: {', '.join(_REGISTRY)}.")
    return import_module(f"{__name__}.{_REGISTRY[name]}").ALLOCATOR
