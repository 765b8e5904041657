"""Builds the emulated kernels with g++ into a cache folder, each object named by the hash of what it is made of."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
EMULATOR = Path(__file__).parent / "emulator"
DRIVERS = ("cosine", "gram", "matrices", "topk", "emulator")
# Every module has its own copy of the emulator's state: -fno-gnu-unique lets two be loaded at once.
FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden", "-DUNIRANK_EMULATOR")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def find_compiler() -> str | None:
    """The C++ compiler of CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _run(command: Iterable[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{done.stderr}")


class Builder:
    """Compiles against one folder of kernels: the project's, or a mutant's copy."""

    def __init__(self, cache: Path, kernels: Path = KERNELS) -> None:
        compiler = find_compiler()
        if compiler is None:
            raise RuntimeError("no g++")
        self.compiler, self.cache, self.kernels = compiler, cache, kernels
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        headers = sorted([*kernels.glob("*.cuh"), *EMULATOR.glob("*.h")])
        self.common = version.encode() + b"".join(path.read_bytes() for path in headers)

    def _cached(self, suffix: str, content: Iterable[bytes], command: Iterable[object]) -> Path:
        """The file that `command` makes when `-o FILE` is appended, made only where `content` is new."""
        target = self.cache / f"{hashlib.sha256(b'/'.join(content)).hexdigest()[:24]}{suffix}"
        if not target.exists():
            # Written beside and renamed: other test processes may be building the same.
            unfinished = target.with_suffix(f".{os.getpid()}{suffix}")
            _run([*command, "-o", unfinished])
            unfinished.replace(target)
        return target

    def object(self, source: Path, *flags: str) -> Path:
        flags = (*FLAGS, *WARNINGS, *flags)
        content = [self.common, source.read_bytes(), repr(flags).encode()]
        includes = ("-I", self.kernels.parent, "-I", EMULATOR)
        return self._cached(".o", content, [self.compiler, *flags, *includes, "-c", source])

    def objects(self, drivers: Iterable[str] = DRIVERS, *flags: str) -> list[Path]:
        sources = [EMULATOR / f"{name}_driver.cpp" for name in drivers]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda source: self.object(source, *flags), sources))

    def binding(self) -> Path:
        """The object that makes a Python module of the drivers."""
        import pybind11

        includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
        return self.object(EMULATOR / "module.cpp", *includes)

    def module(self, objects: list[Path]) -> Path:
        """The objects of all drivers and the binding, linked."""
        objects = [*objects, self.binding()]
        return self._cached(".so", [path.name.encode() for path in objects], [self.compiler, "-shared", *objects])

    def sanitized_program(self) -> Path:
        """A program that drives every kernel under AddressSanitizer and UndefinedBehaviorSanitizer."""
        with ThreadPoolExecutor(2) as pool:
            main = pool.submit(self.object, EMULATOR / "sanitized_main.cpp", *SANITIZE)
            objects = [*self.objects(DRIVERS, *SANITIZE), main.result()]
        content = [path.name.encode() for path in objects]
        return self._cached(".run", content, [self.compiler, *SANITIZE, *objects])


def load(path: Path) -> ModuleType:
    """The module `emulated` in the shared library at `path`."""
    # pybind11 gives the same module again for the same name, whatever the path.
    spec = importlib.util.spec_from_file_location(f"{path.stem}.emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
