"""The native libraries: where they are, whether they load, and which GPUs the CUDA one has code for."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unirank.errors import first_line, warn

_CPU = "unirank_cpu.so"
_CUDA = "unirank_cuda.so"
_BUILD = "`UNIRANK_CUDA=ON pip install --no-build-isolation --no-deps --force-reinstall .` in the source tree"


@dataclass(frozen=True)
class CudaLibrary:
    """What became of `unirank_cuda.so` in this process.

    Attributes:
        problem: why it was not loaded, a sentence without its end; None where it was.
        architectures: what it was compiled for, in CMake's words ("80": machine code and PTX, "86-real": machine code,
            "90-virtual": PTX); empty where that is unknown.
    """

    problem: str | None
    architectures: tuple[str, ...] = ()


def _find(name: str) -> Path | None:
    # An editable install keeps the libraries in site-packages, away from the source: the package's path names both.
    paths = (Path(folder) / name for folder in sys.modules["unirank"].__path__)
    return next((path for path in paths if path.exists()), None)


def load_cpu_library() -> None:
    """Load the CPU kernels and the schemas of all ops. Raises ImportError where they are not built."""
    path = _find(_CPU)
    if path is None:
        raise ImportError(
            f"unirank's native library {_CPU} is not built: run `pip install --no-build-isolation -e .` "
            "in the source tree, with torch already installed."
        )
    torch.ops.load_library(str(path))


def load_cuda_library() -> CudaLibrary:
    """Load the CUDA kernels where they were built and torch is a CUDA build.

    A library that does not load, say of another CUDA than torch's, is one UnirankWarning: the compositions serve.
    """
    path, cpu_build = _find(_CUDA), torch.version.cuda is None
    if path is None:
        why = f"torch {torch.__version__} is a CPU build" if cpu_build else f"build it with {_BUILD}"
        return CudaLibrary(f"{_CUDA} was not built; {why}")
    if cpu_build:
        # It needs libraries that came with a CUDA torch, over which this one was installed.
        return CudaLibrary(f"{_CUDA} needs a CUDA build of torch, and torch {torch.__version__} is a CPU build")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch's own message names the file alone; the loader's, behind it, what is wrong with it.
        reason = first_line(error.__cause__ or error)
        problem = (
            f"{_CUDA} does not load into torch {torch.__version__} with CUDA {torch.version.cuda} "
            f"({reason}); build it again with {_BUILD}"
        )
        warn(f"CUDA tensors are served by torch compositions, which are slower: {problem}.")
        return CudaLibrary(problem)
    return CudaLibrary(None, _architectures(path))


def _architectures(path: Path) -> tuple[str, ...]:
    """What cmake/cuda.cmake wrote into the library."""
    try:
        start = ctypes.c_char.in_dll(ctypes.CDLL(str(path)), "unirank_cuda_architectures")
    except ValueError:  # built before it was written there
        return ()
    return tuple(ctypes.string_at(ctypes.addressof(start)).decode().split(";"))


def covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` runs on a device of compute capability (major, minor).

    Machine code runs on later minors of its major version; PTX on every later device; either, of an architecture with a
    letter ("90a"), only on that device. Unknown architectures, and words such as "native", count as covering: the
    launch will tell. Source: NVIDIA, CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    for text in architectures:
        found = re.fullmatch(r"(\d+)(\d)([a-z]?)(-real|-virtual)?", text)
        if found is None:
            return True
        built, kind = (int(found[1]), int(found[2])), found[4]
        if found[3]:
            if built == capability:
                return True
        elif (kind != "-virtual" and built[0] == capability[0] and built <= capability) or (
            kind != "-real" and built <= capability
        ):
            return True
    return not architectures
