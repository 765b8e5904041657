"""Linears whose calibration tokens show fewer directions than they have, found in the spectra of a store.

A moment of deficient rank has eigenvalues that are 0 but for rounding, and rounding makes about half of these negative.
`eigh_descending` sets what is negative to 0, so an energy of exactly 0 tells of it, and none of full rank has one. The
rank is at most what is left, and at most the number of tokens. Shrinkage gives energy to every direction, so a store
that was made with it tells nothing; nor does one of float32, where rounding is larger than what a moment of full rank
has at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unirank.analysis.scheme import scheme as scheme_of
from unirank.analysis.store import AnalysisStore


@dataclass(frozen=True)
class Deficient:
    """A linear: its name, the largest rank that its outputs on the calibration tokens can have, and its K."""

    name: str
    rank: int
    k: int


def deficient(store: AnalysisStore) -> tuple[Deficient, ...]:
    """The linears of `store` whose spectrum ends before K, in order; none where the scheme takes no moments.

    Only where K is larger than the rank of the moment can it be seen, and only there does it matter: the components
    beyond are of no energy. A weight that is of deficient rank itself shows in the same way.

    Raises StoreError like `AnalysisStore.energies`.
    """
    used = store.identity.calibration
    if not scheme_of(store.identity.scheme).needs_moment or used.precision == "float32" or used.shrink:
        return ()
    tokens = used.windows * used.window
    found = []
    for name, energy in store.energies().items():
        left = int((energy > 0).sum())
        if left < len(energy):
            found.append(Deficient(name, min(left, tokens), len(energy)))
    return tuple(found)


def as_record(found: Sequence[Deficient]) -> dict[str, Any]:
    """For JSON: the largest rank and K by name."""
    return {one.name: {"rank": one.rank, "k": one.k} for one in found}


def told(found: Sequence[Deficient], linears: int) -> str:
    """One sentence about them, of `linears` in all; empty where there are none."""
    if not found:
        return ""
    worst = min(found, key=lambda one: one.rank / one.k)
    return (
        f"The calibration tokens show too few directions for {len(found)} of {linears} linears, least for {worst.name} "
        f"(at most {worst.rank} of {worst.k}): the rest counts for nothing and is cut away; more Calibration.windows, "
        "or other text, show more."
    )
