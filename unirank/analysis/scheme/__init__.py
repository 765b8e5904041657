"""Decomposition schemes, one file each. To add one: write the file, add its line here and its row to docs/method.md.

A file is imported when its scheme is asked for, so that names cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from unirank.errors import InputError

if TYPE_CHECKING:
    from unirank.analysis.scheme.base import Scheme

# Name -> file, and the record in it.
_REGISTRY = {
    "svd": ("svd", "SCHEME"),
    "asvd": ("scaled", "ASVD"),
    "awsvd": ("scaled", "AWSVD"),
    "fwsvd": ("scaled", "FWSVD"),
    "whiten": ("whiten", "SCHEME"),
    "afm": ("afm", "SCHEME"),
    "kfac": ("kfac", "SCHEME"),
}


def schemes() -> tuple[str, ...]:
    """Names of all schemes."""
    return tuple(_REGISTRY)


def scheme(name: str) -> Scheme:
    """The scheme of that name; raises InputError with the legal names."""
    if name not in _REGISTRY:
        raise InputError(f"The scheme {name!r} does not exist; legal values: {', '.join(_REGISTRY)}.")
    file, record = _REGISTRY[name]
    return getattr(import_module(f"{__name__}.{file}"), record)
