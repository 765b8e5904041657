"""Amounts as people write them: `10%`, `100M`, `200MB`."""

from __future__ import annotations

import re
from fractions import Fraction

from unirank.errors import InputError

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {"": 1, "B": 1} | {f"{letter}B": 10 ** (3 * power) for power, letter in enumerate("KMGT", start=1)}
_BYTES |= {f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)")


def read_share(flag: str, given: str) -> float:
    """`"10%"` or `"0.1"` -> 0.1; what it may be is the library's matter."""
    number, unit = _split(given)
    if number is None or unit not in ("", "%"):
        raise InputError(f"{flag} {given} is not legal; it is a percentage such as 10%, or a fraction such as 0.1.")
    return float(number / 100 if unit == "%" else number)


def read_fraction(given: str) -> float:
    """`"20%"` or any number -> 0.2; what it may be is the library's matter. Raises ValueError for anything else."""
    number, unit = _split(given)
    return float(number / 100) if number is not None and unit == "%" else float(given)


def read_count(flag: str, given: str) -> int:
    """`"100M"` -> 100_000_000; a fraction of one is dropped."""
    number, unit = _split(given)
    if number is None or unit.upper() not in _COUNTS:
        raise InputError(f"{flag} {given} is not legal; it is a number such as 100M, 1.5B or 100000000.")
    return int(number * _COUNTS[unit.upper()])


def read_bytes(flag: str, given: str) -> int:
    """`"200MB"` -> 200_000_000, `"200MiB"` -> 209_715_200; a fraction of a byte is dropped."""
    number, unit = _split(given)
    if number is None or unit.upper() not in _BYTES:
        raise InputError(f"{flag} {given} is not legal; it is a number of bytes such as 200MB, 1.5GB or 200MiB.")
    return int(number * _BYTES[unit.upper()])


def _split(given: str) -> tuple[Fraction | None, str]:
    found = _NUMBER.fullmatch(given.strip())
    return (Fraction(found[1]), found[2]) if found else (None, "")
