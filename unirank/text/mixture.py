"""Several texts for one set of windows: their names in one string, how many windows each gives, and in which order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction

import torch

from unirank.errors import InputError

SEPARATOR = ","


def sources_of(text: str) -> tuple[str, ...]:
    """The texts that `text` names: parts between commas, or one, where there is no comma or a path has that name.

    Raises InputError where nothing stands between two commas, or a name stands twice.
    """
    if SEPARATOR not in text or os.path.exists(text):
        return (text,)
    parts = tuple(part.strip() for part in text.split(SEPARATOR))
    if not all(parts):
        raise InputError(f"The texts {text!r} are not legal; names stand between commas, and one of them is empty.")
    if len(set(parts)) < len(parts):
        raise InputError(f"The texts {text!r} are not legal; one of them is named twice.")
    return parts


def shared_out(windows: int, shares: Sequence[float], names: Sequence[str]) -> list[int]:
    """How many of `windows` each text gives, by its share: rounded down, the rest to the largest remainders.

    Of equal remainders the first one is served first. Raises InputError where a text would give no window; says which.
    """
    exact = [Fraction(share) for share in shares]
    quotas = [windows * share / sum(exact) for share in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - quotas[i], i))
    for index in by_remainder[: windows - sum(counts)]:
        counts[index] += 1
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise InputError(
                f"The text {name} would give none of {windows} windows; "
                "take more windows, or give it a larger share (Calibration.windows, Calibration.shares)."
            )
    return counts


def interleaved(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The windows of all `parts`, int64 `[W_i, T]`, as one tensor `[Σ W_i, T]` in which each keeps its own order.

    Every beginning holds the parts as near to their shares as can be: the next window is of the part that is furthest
    behind, of equal ones the first (**choice**). So the first windows, which run backward or are measured on, are of
    all parts. One part is given back as it is.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(len(part) for part in parts)
    given = [0] * len(parts)
    rows = []
    for position in range(total):
        behind = [len(part) * (position + 1) - done * total for part, done in zip(parts, given, strict=True)]
        chosen = behind.index(max(behind))
        rows.append(parts[chosen][given[chosen]])
        given[chosen] += 1
    return torch.stack(rows)
