"""Decomposition schemes, one file each. To add one: write the file, add its line here and its row to docs/method.md."""

from __future__ import annotations

from unirank.analysis.scheme import afm, kfac, scaled, svd, whiten
from unirank.analysis.scheme.base import Problem, Scheme
from unirank.errors import InputError

_REGISTRY: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (svd.SCHEME, scaled.ASVD, scaled.AWSVD, scaled.FWSVD, whiten.SCHEME, afm.SCHEME, kfac.SCHEME)
}


def schemes() -> tuple[str, ...]:
    """Names of all decomposition schemes."""
    return tuple(_REGISTRY)


def scheme(name: str) -> Scheme:
    """The scheme of that name; raises InputError with the legal names."""
    if name not in _REGISTRY:
        raise InputError(f"The scheme {name!r} does not exist; legal values: {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]


__all__ = ["Problem", "Scheme", "scheme", "schemes"]
