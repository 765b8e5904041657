"""The directory in which a killed run resumes: whose it is, and that it belongs to no other run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unirank.disk.files import check_output, leftover, write_json
from unirank.disk.hashing import differences
from unirank.disk.strictjson import parse_object
from unirank.errors import InputError


def check_work(work: Path, name: str) -> None:
    """Refuse a directory that no run of ours made. Raises InputError like `check_output`.

    Args:
        name: of the file in it that `claim` writes. What a run left that was killed while it wrote it is ours too.
    """
    entries = os.listdir(work) if work.is_dir() else []
    if not entries or not all(re.fullmatch(leftover(re.escape(name)), entry) for entry in entries):
        check_output(work, marker=name, overwrite=True)


def claim(work: Path, name: str, recipe: Mapping[str, Any], what: str) -> None:
    """Make `work` ours, or resume it.

    Args:
        name: of the file in it that holds the recipe.
        recipe: everything that the result depends on.
        what: the run, in words ("fine-tuning").

    Raises InputError when it belongs to another run, with what differs, or its recipe is damaged.
    """
    file = work / name
    if not file.is_file():
        write_json(file, recipe)
        return
    try:
        found = parse_object(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); delete {work} to start again.") from error
    differs = differences(found, json.loads(json.dumps(recipe)), was="there")
    if differs:
        raise InputError(
            f"The directory {work} belongs to another {what}; it differs in {'; '.join(differs)}. "
            "Delete it, or choose another."
        )
