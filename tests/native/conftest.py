"""Builds the emulated kernels and the mock of cuSOLVER once per session, through caches that survive it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def solver_mock() -> ModuleType:
    """The cuSOLVER driver and launcher of csrc/cuda over the mock cuSOLVER, as a Python module."""
    pytest.importorskip("pybind11", reason="the mock of cuSOLVER needs pybind11")
    sys.path.insert(0, str(Path(__file__).parent / "mock"))
    import build

    return build.load()


@pytest.fixture
def mock(solver_mock: ModuleType) -> Iterator[ModuleType]:
    """The mock, clean before; after the test nothing may be left but this thread's handles.

    Those are two at most: the driver's tests run on device 0, and the launcher's on -1, the index of CPU tensors.
    """
    solver_mock.reset()
    yield solver_mock
    assert {kind: count for kind, count in solver_mock.live().items() if count and kind != "handle"} == {}
    assert solver_mock.live().get("handle", 0) <= 2
    solver_mock.reset()
