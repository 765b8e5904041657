"""JSON from outside: whatever a file holds, reading it gives an object or a ValueError."""

from __future__ import annotations

import json
from typing import Any


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises ValueError for anything else: other values, NaN, names given twice, text that
    nests too deeply."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is no object but {type(value).__name__}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it gives a name twice")
    return found
