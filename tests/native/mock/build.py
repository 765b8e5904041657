"""Build and import the mock: the CUDA driver and launcher of `csrc/cuda`, compiled by the host compiler alone."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[3]
MOCK = Path(__file__).resolve().parent
EMULATOR = MOCK.parent / "emulator"
NAME = "solver_mock"

sys.path.insert(0, str(ROOT / "tools"))
import cuda_headers  # noqa: E402

SOURCES = (
    ROOT / "csrc/core/blas.cpp",
    ROOT / "csrc/cuda/blas_handle.cpp",
    ROOT / "csrc/cuda/eigh.cpp",
    ROOT / "csrc/cuda/memory.cpp",
    ROOT / "csrc/cuda/solver_handle.cpp",
    ROOT / "csrc/cuda/svd.cpp",
    MOCK / "binding.cpp",
    MOCK / "cublas.cpp",
    MOCK / "cudart.cpp",
    MOCK / "cusolver.cpp",
    MOCK / "cusolver_eigh.cpp",
    MOCK / "cusolver_svd32.cpp",
    MOCK / "cusolver_svd64.cpp",
    MOCK / "launcher.cpp",
    MOCK / "matrices.cpp",
    MOCK / "mock.cpp",
    EMULATOR / "matrices_driver.cpp",
)
FLAGS = (
    "-std=c++20",
    "-O1",
    "-g",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
)


def _fingerprint(command: list[str]) -> str:
    headers = (*MOCK.glob("*.h"), *EMULATOR.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"))
    inputs = [*SOURCES, *headers, ROOT / "csrc/cuda/linalg.cu"]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the mock does not compile:\n{result.stderr}")


def load() -> ModuleType:
    """The module `solver_mock`, compiled where its sources have changed."""
    torch_root = Path(torch.__file__).parent
    system = [
        *cuda_headers.include_folders(),
        torch_root / "include",
        Path(pybind11.get_include()),
        Path(sysconfig.get_paths()["include"]),
    ]
    command = [
        os.environ.get("CXX", "g++"),
        *FLAGS,
        "-DUSE_CUDA",
        "-DUNIRANK_EMULATOR",
        "-DTORCH_TARGET_VERSION=0x020A000000000000",
        f"-I{ROOT / 'csrc'}",
        f"-I{MOCK}",
        f"-I{EMULATOR}",
        *(f"-isystem{folder}" for folder in system),
    ]
    folder = cuda_headers.cache() / "mock" / _fingerprint(command)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
        with ThreadPoolExecutor(2) as pool:
            jobs = zip(SOURCES, objects, strict=True)
            list(pool.map(lambda job: _compile([*command, "-c", str(job[0]), "-o", job[1]]), jobs))
        lib = torch_root / "lib"
        unfinished = library.with_suffix(f".{os.getpid()}")
        # -Bsymbolic: what the mock defines must not be looked for in a torch that has it too.
        link = [
            "-shared",
            "-Wl,-Bsymbolic",
            "-Wl,--no-as-needed",
            f"-L{lib}",
            "-l:libtorch_cpu.so",
            f"-Wl,-rpath,{lib}",
        ]
        _compile([command[0], *objects, *link, "-o", str(unfinished)])
        unfinished.rename(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
