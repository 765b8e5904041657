"""Numbers that were found by running the model, kept in a store for the next plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unirank.disk.files import write_json
from unirank.disk.strictjson import Damaged, entry, number, read_object


def kept_numbers(
    file: Path, settings: Mapping[str, Any], names: Sequence[str], measure: Callable[[], Mapping[str, float]]
) -> dict[str, float]:
    """The number of each of `names` that is in `file`; where there is none, what `measure()` gives, which is then kept.

    A folder that may not be written to keeps nothing. Raises Damaged when the file is, and what `measure` raises.
    """
    if not file.is_file():
        values = dict(measure())
        if os.access(file.parent, os.W_OK):
            write_json(file, {"settings": settings, "values": values})
        return values
    values = entry(read_object(file), "values", dict)
    if values.keys() != set(names):
        raise Damaged("its numbers are others than are asked for")
    return {name: number(values[name], name) for name in names}
