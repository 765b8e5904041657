"""What CMake decides: whether the CUDA kernels are built and for which devices, and which flags users do not get."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.support.wheel import ROOT

BIN = Path(sys.executable).parent
CMAKE = shutil.which("cmake", path=f"{BIN}{os.pathsep}{os.environ['PATH']}") or "cmake"
NEW, CUDA = "3.25.2", "13.0"


def cmake(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as a script, beside what cmake/cuda_mode.cmake defines."""
    script = folder / "script.cmake"
    script.write_text(f"cmake_minimum_required(VERSION 3.24)\ninclude({ROOT}/cmake/cuda_mode.cmake)\n{code}\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDAARCHS", "CMAKE_CUDA_ARCHITECTURES")}
    return subprocess.run([CMAKE, "-P", str(script)], capture_output=True, text=True, env=clean | environment)


def decided(folder: Path, wanted: str, *, version: str = NEW, torch_cuda: str = CUDA, nvcc: str = CUDA):
    arguments = f'missing "{version}" 2.13.0 "{torch_cuda}" "{nvcc}"'
    return cmake(
        f"unirank_cuda_missing({arguments})\nunirank_cuda_mode(mode {wanted} " + '"${missing}")\nmessage("<${mode}>")',
        folder,
    )


LACKS = [
    ({"version": "3.25.1"}, "CMake 3.25.1 is too old for CUDA in C++20; install CMake 3.25.2 or newer"),
    ({"version": "3.24.0"}, "CMake 3.24.0 is too old for CUDA in C++20"),
    ({"torch_cuda": ""}, "torch 2.13.0 is a CPU build"),
    ({"nvcc": ""}, "nvcc was not found"),
    ({"nvcc": "12.6"}, "nvcc 12.6 is too old"),
    ({"torch_cuda": "12.8"}, "nvcc is 13.0, but torch was built with CUDA 12.8"),
]


@pytest.mark.parametrize(("lack", "said"), LACKS)
def test_auto_falls_back_with_the_reason_and_on_stops_with_it(lack: dict[str, str], said: str, tmp_path: Path) -> None:
    auto = decided(tmp_path, "AUTO", **lack)
    assert auto.returncode == 0
    assert f"unirank: CUDA off, {said}" in auto.stdout
    assert "<OFF>" in auto.stderr
    on = decided(tmp_path, "ON", **lack)
    assert on.returncode != 0
    assert f"UNIRANK_CUDA=ON cannot be honoured: {said}" in " ".join(on.stderr.split())


@pytest.mark.parametrize(("wanted", "mode"), [("AUTO", "ON"), ("ON", "ON"), ("OFF", "OFF")])
def test_with_all_that_is_needed_the_wish_decides(wanted: str, mode: str, tmp_path: Path) -> None:
    assert f"<{mode}>" in decided(tmp_path, wanted).stderr
    assert "UNIRANK_CUDA must be AUTO, ON or OFF, got MAYBE" in decided(tmp_path, "MAYBE").stderr


def architectures(folder: Path, code: str = "", **environment: str) -> list[str]:
    done = cmake(f'{code}\nunirank_cuda_architectures(found)\nmessage("<${{found}}>")', folder, **environment)
    return re.findall("<(.*)>", done.stderr)[0].split(";")


def test_every_device_from_75_on_has_code(tmp_path: Path) -> None:
    from unirank.libraries import covers

    built = architectures(tmp_path)
    devices = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]
    assert [device for device in devices if not covers(built, device)] == []
    assert not covers(built, (7, 0))


def test_the_environment_chooses_architectures(tmp_path: Path) -> None:
    assert architectures(tmp_path, CUDAARCHS="90-real;100") == ["90-real", "100"]
    assert architectures(tmp_path, CUDAARCHS="90", CMAKE_CUDA_ARCHITECTURES="80") == ["80"]
    assert architectures(tmp_path, "set(CMAKE_CUDA_ARCHITECTURES 89-real)", CUDAARCHS="90") == ["89-real"]


@pytest.mark.slow
def test_warnings_are_errors_only_where_that_is_asked_for(tmp_path: Path) -> None:
    def flags(*more: str) -> set[bool]:
        command = [CMAKE, "-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}", *more]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"UNIRANK_CUDA": "OFF"})
        assert done.returncode == 0, done.stderr
        return {"-Werror" in unit["command"] for unit in json.loads((tmp_path / "compile_commands.json").read_text())}

    assert flags() == {False}
    assert flags("-DCMAKE_COMPILE_WARNING_AS_ERROR=ON") == {True}
    assert "CMAKE_ARGS=-DCMAKE_COMPILE_WARNING_AS_ERROR=ON" in (ROOT / ".ci" / "run").read_text()


# What unirank_cuda.so links, directly or through these, as `readelf -d` names it.
NVIDIA = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcusolver.so.12", "libcusparse.so.12")


@pytest.mark.parametrize("place", ["Makefile", "pyproject.toml"])
def test_a_wheel_takes_no_library_of_torch_or_nvidia_in(place: str) -> None:
    text = (ROOT / place).read_text()
    excluded = re.findall(r"--exclude '([^']+)'", text)
    wanted = (*NVIDIA, "libnvJitLink.so.13", "libtorch_cuda.so", "libtorch_cpu.so", "libc10.so")
    assert [name for name in wanted if not any(fnmatch(name, pattern) for pattern in excluded)] == []
