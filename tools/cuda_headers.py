"""Find or fetch what compiling for CUDA needs: nvcc, the toolkit's headers, and the headers of cuBLAS and cuSOLVER.

A machine without a GPU and with the CPU build of torch is enough. What is missing comes from NVIDIA's wheels on PyPI,
through pip, into a cache folder (`build/cuda`, or `UNIRANK_CUDA_CACHE`); nothing of it is ever committed.
Run it to print the include folders, one a line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIBRARY_WHEELS = ("nvidia-cusolver==12.0.4.66", "nvidia-cublas==13.1.1.3")
RUNTIME_WHEELS = ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88", "nvidia-cuda-cccl==13.2.86")
COMPILER_WHEELS = ("nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88", *RUNTIME_WHEELS)
DISASSEMBLER_WHEELS = ("nvidia-cuda-cuobjdump==13.2.51", "nvidia-cuda-nvdisasm==13.2.51")


def cache() -> Path:
    """The folder for everything fetched or compiled here; survives between runs."""
    path = Path(os.environ.get("UNIRANK_CUDA_CACHE", ROOT / "build" / "cuda"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True)


def _fetch_headers(wheels: tuple[str, ...], folder: Path) -> None:
    # The libraries inside these wheels are 600 MB; only the megabyte of headers is kept.
    with tempfile.TemporaryDirectory() as downloads:
        _pip("download", "--no-deps", "--dest", downloads, *wheels)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
            for wheel in Path(downloads).glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(unpacked, [n for n in archive.namelist() if "/include/" in n])
            # Appears under its name only when complete, so an interrupted download leaves nothing half.
            (Path(unpacked) / "nvidia" / "cu13" / "include").rename(folder)


def _headers(name: str, wheels: tuple[str, ...]) -> Path:
    folder = cache() / f"include-{name}"
    if not folder.is_dir():
        _fetch_headers(wheels, folder)
    return folder


def _installed(name: str, wheels: tuple[str, ...]) -> Path:
    folder = cache() / name
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as target:
            _pip("install", "--no-deps", "--target", target, *wheels)
            (Path(target) / "nvidia" / "cu13").rename(folder)
    return folder


def toolkit_nvcc() -> Path | None:
    """The nvcc of an installed toolkit."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    return Path(found).resolve() if found else None


def nvcc() -> Path:
    """An installed nvcc, else the one from NVIDIA's wheels (274 MB, once)."""
    return toolkit_nvcc() or _installed("toolkit", COMPILER_WHEELS) / "bin" / "nvcc"


def _toolkit_include() -> Path | None:
    compiler = toolkit_nvcc()
    if compiler is None:
        return None
    home = compiler.parent.parent
    for folder in (home / "include", *home.glob("targets/*/include")):
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    # A wrapper script on the PATH stands beside no headers: ask it where its toolkit is.
    dry_run = subprocess.run(
        [compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    for line in dry_run.splitlines():
        if line.startswith("#$ TOP="):
            folder = Path(line.removeprefix("#$ TOP=")) / "include"
            return folder.resolve() if (folder / "cuda_runtime_api.h").exists() else None
    return None


def include_folders() -> list[Path]:
    """Folders with cuda_runtime_api.h, cublas_v2.h and cusolverDn.h."""
    runtime = _toolkit_include()
    # Its own folder before the toolkit's: a toolkit may carry another version of the two libraries' headers.
    return [_headers("libraries", LIBRARY_WHEELS), runtime or _headers("runtime", RUNTIME_WHEELS)]


def cuobjdump() -> Path:
    """NVIDIA's tool that takes machine code out of objects, from its wheel; it calls nvdisasm, which lies beside it."""
    return _installed("disassembler", DISASSEMBLER_WHEELS) / "bin" / "cuobjdump"


if __name__ == "__main__":
    print(*include_folders(), sep="\n")
