"""Code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(source: str, **environment: str) -> str:
    """What `source` prints in a process of its own with this environment added; any warning fails there."""
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
