"""The wheel, built from what git would deliver, and Python processes that see it in the place of the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def delivered(source: Path) -> Path:
    """A copy, at `source`, of what git would deliver and a build looks at."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if name.startswith(("unirank/", "csrc/", "cmake/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


def build_wheel(folder: Path, **environment: str) -> Path:
    """As `make wheel` does it, of the CPU's kernels alone; `folder` is for it to use."""
    source = delivered(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "-w", str(folder / "dist"), str(source)],
        capture_output=True,
        text=True,
        env=os.environ | {"UNIRANK_CUDA": "OFF", "PATH": path} | environment,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def away_from_source(wheel: Path, folder: Path) -> list[str]:
    """Unpack the wheel into `folder`; the start of a command `python -c CODE` that finds it, and no source tree.

    `-S` keeps the editable installation of the tests away; what unirank needs comes from the same environment.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    paths = [str(folder), sysconfig.get_path("purelib")]
    start = f"import sys; sys.path[:0] = {paths!r}; exec(sys.argv.pop(1))"
    return [sys.executable, "-S", "-c", start]
