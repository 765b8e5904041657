"""Points that were measured, kept one file each, and found again where everything that they depend on is the same."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unirank.disk.files import check_output, make_directory, write_json
from unirank.disk.hashing import sha256_text
from unirank.disk.strictjson import Damaged, entry, read_object
from unirank.errors import InputError
from unirank.evaluation.measured_curve import CurvePoint

CURVE_FILE = "curve.json"
_FOLDER = "points"
_FORMAT = 1
_OURS = rf"{_FOLDER}|{re.escape(CURVE_FILE)}|analysis-\w+|held-out\.txt"  # what is there, whichever comes first


class Kept:
    """The points in a directory.

    `points/HASH.json` holds one point, what it was measured under (weights, store, tokens, recipe, fraction, versions,
    device), and `meta`. The name is a hash of what it was measured under. So nothing that was measured is replaced by
    what was measured under other conditions: with another text there are more files, and with the first text again the
    first ones are found.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

    def check(self) -> None:
        """Raise InputError where `place` is a directory of something else, or cannot be one."""
        names = sorted(os.listdir(self.place)) if self.place.is_dir() else []
        marker = next((name for name in names if re.fullmatch(_OURS, name)), _FOLDER)
        check_output(self.place, marker=marker, overwrite=True)

    def find(self, conditions: Mapping[str, Any]) -> CurvePoint | None:
        """The point that was measured under `conditions`. Raises InputError where its file is damaged."""
        file = self._file(conditions)
        if not file.is_file():
            return None
        try:
            record = read_object(file)
            if entry(record, "format", int) != _FORMAT or entry(record, "conditions", dict) != _plain(conditions):
                raise Damaged("it is of other conditions than its name says")
            return CurvePoint.from_dict(entry(record, "point", dict))
        except Damaged as error:
            raise InputError(f"{file} is damaged: {error}; delete it, and it is measured again.") from error

    def keep(self, conditions: Mapping[str, Any], point: CurvePoint, meta: Mapping[str, Any]) -> None:
        """Write it at once, whole or not at all. Raises WriteError when the disk refuses."""
        make_directory(self.place / _FOLDER)
        record = {"format": _FORMAT, "conditions": dict(conditions), "point": point.as_dict(), "meta": dict(meta)}
        write_json(self._file(conditions), record)

    def _file(self, conditions: Mapping[str, Any]) -> Path:
        key = sha256_text(json.dumps(conditions, sort_keys=True))
        return self.place / _FOLDER / f"{key[:16]}.json"


def _plain(conditions: Mapping[str, Any]) -> Any:
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(conditions))
