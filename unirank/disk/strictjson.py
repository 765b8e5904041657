"""JSON from outside: whatever a file holds, reading it gives checked values or `Damaged`."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


class Damaged(ValueError):  # noqa: N818 - what a file is, caught where the file's name is known
    """What was read is missing, cut off, or nothing that unirank writes. Nothing else is: a slip of ours is no damage,
    and must never make people delete good files."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises Damaged like `parse_object`, and where the file cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(str(error)) from error
    return parse_object(text)


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises Damaged for anything else: other values, NaN, names given twice, text that
    nests too deeply."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except Damaged:
        raise
    except ValueError as error:
        raise Damaged(f"it is not JSON: {error}") from error
    except RecursionError:
        raise Damaged("it nests too deeply") from None
    if not isinstance(value, dict):
        raise Damaged(f"it is no object but {type(value).__name__}")
    return value


def entry(record: Any, key: str, *kinds: type) -> Any:
    """`record[key]`, which has exactly one of the types `kinds` (True is no int). Raises Damaged."""
    if not isinstance(record, dict) or key not in record:
        raise Damaged(f"it has no {key}")
    value = record[key]
    if type(value) not in kinds:
        raise Damaged(f"{key} is {str(value)[:80]!r}")
    return value


def number(value: Any, what: str) -> float:
    """A finite number as a float. Raises Damaged for anything else; `what` names it."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Damaged(f"{what} is {str(value)[:80]!r}")
    return found


def build(cls: type[_T], record: Any) -> _T:
    """The dataclass `cls` from an object with exactly its fields, whose values it is left to check. Raises Damaged."""
    names = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
    if not isinstance(record, dict) or record.keys() != set(names):
        raise Damaged(f"there are other entries than {', '.join(names)}")
    return cls(**record)


def _no_constant(name: str) -> None:
    raise Damaged(f"{name} is no number of JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Damaged("it gives a name twice")
    return found
