"""What `tools/check_cuda.py` sees in an object file: how many handles a thread would make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import check_cuda

ONE = """
struct Handles { Handles(); ~Handles(); };
Handles& of_a_thread() { thread_local Handles handles; return handles; }
template <typename T> Handles& handles() { return of_a_thread(); }
template Handles& handles<float>();
template Handles& handles<double>();
"""
ONE_EACH = """
struct Handles { Handles(); ~Handles(); };
template <typename T> Handles& handles() { static thread_local Handles handles; return handles; }
template Handles& handles<float>();
template Handles& handles<double>();
"""


@pytest.mark.parametrize(("source", "count"), [("int x;", 0), (ONE, 1), (ONE_EACH, 2)])
def test_a_template_must_not_make_a_handle_for_each_instance(tmp_path: Path, source: str, count: int) -> None:
    target = tmp_path / "some.o"
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-c", "-x", "c++", "-", "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)
    assert len(check_cuda.thread_locals(target)) == count
    complaints = check_cuda.shared_too_little([target])
    assert len(complaints) == (count > 1)
    assert all("handles<float>()::handles" in complaint for complaint in complaints)
