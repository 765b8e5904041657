"""Builds the emulated kernels once per session, through a cache that survives it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from emulation import Builder, find_compiler, load


@pytest.fixture(scope="session")
def builder(request: pytest.FixtureRequest) -> Builder:
    if find_compiler() is None:
        pytest.skip("no C++ compiler: emulating the kernels needs g++ on the PATH, or CXX")
    pytest.importorskip("pybind11", reason="emulating the kernels needs pybind11")
    assert request.config.cache is not None
    return Builder(Path(request.config.cache.mkdir("unirank-emulator")))


@pytest.fixture(scope="session")
def emulated_path(builder: Builder) -> Path:
    return builder.module(builder.objects())


@pytest.fixture(scope="session")
def emulated(emulated_path: Path) -> ModuleType:
    """The kernels of csrc/kernels/ on the CPU, as a Python module."""
    return load(emulated_path)
