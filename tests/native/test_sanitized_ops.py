"""The CPU's ops, built with ASan and UBSan, inside an ordinary torch: their own tests, and hostile arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.wheel import ROOT, away_from_source, build_wheel

TESTS = ("test_hostile", "test_cosine", "test_gram", "test_linalg", "test_topk")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
PYTEST = "import sys, pytest; sys.path.insert(0, '.'); sys.exit(pytest.main(sys.argv[1:]))"


def preloaded() -> str:
    """The sanitizers' libraries, which have to be there before Python's first allocation."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return " ".join(found)


def test_the_ops_touch_no_memory_that_is_not_theirs(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path / "build", CXX="g++", CXXFLAGS=FLAGS)
    command = away_from_source(wheel, tmp_path / "installed")
    assert b"__asan_report_store" in (tmp_path / "installed" / "unirank" / "unirank_cpu.so").read_bytes()
    place = tmp_path / "away"
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    chosen = [f"tests/ops/{name}.py" for name in TESTS]
    environment = {
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python and torch free little at their end
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [*command, PYTEST, "-q", "-p", "no:cacheprovider", *chosen],
        cwd=place,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
