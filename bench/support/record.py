"""The one format of result files: an object with `rows` (flat objects) and `meta`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unirank.disk.files import write_json
from unirank.provenance import default_device, meta


def write_result(
    path: Path | None, rows: Sequence[dict[str, Any]], *, device: torch.device | None = None, **more: Any
) -> None:
    """Write `rows` and `meta` (versions, device, threads, and `more`: seeds, hashes) to `path`; None writes nothing.

    `device`: where it was measured; None: on the GPU where there is one.
    """
    if path is not None:
        write_json(path, {"rows": list(rows), "meta": meta(device or default_device(), command=sys.argv, **more)})
