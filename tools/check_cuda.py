"""Compile csrc/cuda for a list of GPU generations, without a GPU, and hold every kernel to its register budget.

Warnings are errors, spills are errors, and so is a kernel without a line `// registers: NAME <= N` in csrc/kernels.
An object may have one thread_local variable, so that a thread has one handle of cuBLAS and of cuSOLVER on a device.
The CPU build of torch is enough: nothing is linked. Objects are kept by the hash of all they are made from.

    python tools/check_cuda.py            sm_80, sm_90, sm_120
    python tools/check_cuda.py --all      every architecture that CUDA 13.0 knows
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cuda_headers

ROOT = cuda_headers.ROOT
COMMON = ("80", "90", "120")
EVERY = ("75", "80", "86", "89", "90", "90a", "100", "100a", "103", "110", "120", "121")
JOBS = 2
HOST_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel instance."""

    kernel: str
    instance: str
    arch: str
    registers: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Unit:
    """One compilation: a source for one architecture; None where the host compiler does it."""

    source: Path
    arch: str | None


def torch_includes() -> list[Path]:
    """Header folders of torch, which is located but not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed here, and its headers are needed: pip install torch")
    return [Path(spec.origin).parent / "include"]


def units(architectures: tuple[str, ...]) -> list[Unit]:
    """Every compilation, slow ones first so that two jobs end together."""
    folder = ROOT / "csrc" / "cuda"
    kernels = sorted(folder.glob("*.cu"), key=lambda path: -path.stat().st_size)
    return [Unit(s, a) for s in kernels for a in architectures] + [Unit(s, None) for s in sorted(folder.glob("*.cpp"))]


def command(unit: Unit) -> list[str]:
    """The compiler call, without its output."""
    includes = [*cuda_headers.include_folders(), *torch_includes()]
    shared = [
        "-std=c++20",
        "-O3",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020A000000000000",
        f"-I{ROOT / 'csrc'}",
        *(part for folder in includes for part in ("-isystem", str(folder))),
        "-c",
        str(unit.source),
    ]
    if unit.arch is None:
        return [os.environ.get("CXX", "g++"), "-fPIC", *HOST_WARNINGS, "-Werror", *shared]
    return [
        str(cuda_headers.nvcc()),
        f"-gencode=arch=compute_{unit.arch},code=sm_{unit.arch}",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        "-Werror=all-warnings",
        "-Xptxas=-v",
        "-Xcompiler=" + ",".join(("-fPIC", *HOST_WARNINGS)),
        *shared,
    ]


def _with_headers(source: Path, seen: set[Path]) -> set[Path]:
    """The source and every header of this project that it includes, directly or not."""
    seen.add(source)
    for name in re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE):
        header = ROOT / "csrc" / name
        if header.exists() and header not in seen:
            _with_headers(header, seen)
    return seen


def compile_unit(unit: Unit) -> tuple[Path, str]:
    """Object file and compiler output of one unit, from the cache where nothing changed."""
    call = command(unit)
    content = [" ".join(call).encode(), *(path.read_bytes() for path in sorted(_with_headers(unit.source, set())))]
    key = hashlib.sha256(b"\0".join(content)).hexdigest()[:16]
    folder = cuda_headers.cache() / "objects"
    folder.mkdir(exist_ok=True)
    base = folder / f"{unit.source.stem}-{unit.arch or 'host'}-{key}"
    target, log = base.with_suffix(".o"), base.with_suffix(".log")
    if not log.exists():
        result = subprocess.run([*call, "-o", str(target)], capture_output=True, text=True, check=False)
        output = result.stdout + result.stderr
        if result.returncode != 0:
            arch = f"sm_{unit.arch}" if unit.arch else "the host"
            raise RuntimeError(f"{unit.source.relative_to(ROOT)} does not compile for {arch}:\n{output}")
        log.write_text(output)
    return target, log.read_text()


def compile_all(architectures: tuple[str, ...]) -> dict[Unit, tuple[Path, str]]:
    """Compile every unit; on failure print every error, not only the first, and exit."""
    work = units(architectures)
    results: dict[Unit, tuple[Path, str]] = {}
    errors = []
    with ThreadPoolExecutor(JOBS) as pool:
        for unit, job in [(unit, pool.submit(compile_unit, unit)) for unit in work]:
            try:
                results[unit] = job.result()
            except RuntimeError as error:
                errors.append(str(error))
    if errors:
        sys.exit("\n".join(errors))
    return results


def demangle(names: list[str]) -> list[str]:
    """C++ names for mangled ones, by the host toolchain's c++filt."""
    if not names:
        return []
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def kernel_name(demangled: str) -> str | None:
    """`cosine_rows` of `void unirank::kernels::cosine_rows<float, 32>(...)`; None for other libraries' kernels."""
    found = re.match(r"(?:void )?unirank::(?:[\w() ]+::)*(\w+)\s*[<(]", demangled)
    return found.group(1) if found else None


def short(demangled: str) -> str:
    """The instance without return type, namespaces and parameters."""
    name = re.sub(r"\((?!anonymous).*", "", demangled.replace("(anonymous namespace)::", "")).removeprefix("void ")
    return re.sub(r"\b(?:\w+::)+", "", name)


def parse(log: str, arch: str) -> list[Usage]:
    """Registers, stack and spills of the project's own kernels in a `ptxas -v` log."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        re.DOTALL,
    )
    entries = pattern.findall(log)
    usages = []
    for name, (_, stack, stores, loads, registers) in zip(demangle([e[0] for e in entries]), entries, strict=True):
        kernel = kernel_name(name)
        if kernel is not None:
            usages.append(Usage(kernel, short(name), arch, int(registers), int(stack), int(stores) + int(loads)))
    return usages


def budgets() -> dict[str, int]:
    """Register budgets by kernel, from the comments beside them."""
    found = {}
    for path in sorted((ROOT / "csrc" / "kernels").glob("*.cuh")):
        for kernel, limit in re.findall(r"^// registers: (\w+) <= (\d+)", path.read_text(), re.MULTILINE):
            found[kernel] = int(limit)
    return found


def problems(usages: list[Usage], limits: dict[str, int]) -> list[str]:
    """One line for every broken rule."""
    found = []
    for u in usages:
        limit = limits.get(u.kernel)
        if limit is None:
            found.append(f"{u.kernel} has no budget: write `// registers: {u.kernel} <= N` beside it in csrc/kernels")
        elif u.registers > limit:
            found.append(f"{u.instance} uses {u.registers} registers on sm_{u.arch}, its budget is {limit}")
        if u.spills:
            found.append(f"{u.instance} spills {u.spills} bytes on sm_{u.arch}")
    found += [f"the budget of {k} is for no kernel that exists" for k in limits.keys() - {u.kernel for u in usages}]
    return sorted(set(found))


def thread_locals(target: Path) -> list[str]:
    """The thread_local variables that an object defines, demangled; a template's are one for each instance."""
    table = subprocess.run(["readelf", "-sW", target], capture_output=True, text=True, check=True).stdout
    fields = [line.split() for line in table.splitlines()]
    mangled = {f[7] for f in fields if len(f) > 7 and f[3] == "TLS" and f[6] != "UND"}
    # A variable that is made at first use has a flag beside it, and the runtime's own have reserved names.
    return [name for name in demangle(sorted(mangled)) if not name.startswith(("guard variable", "__"))]


def shared_too_little(objects: list[Path]) -> list[str]:
    """One line for every object with more thread_local variables than one."""
    found = {target: thread_locals(target) for target in objects}
    return [
        f"{target.name} has {len(names)} thread_local variables, and one is allowed: {', '.join(names)}"
        for target, names in sorted(found.items())
        if len(names) > 1
    ]


def print_table(usages: list[Usage], limits: dict[str, int], architectures: tuple[str, ...]) -> None:
    """For each kernel the most registers that any of its instances takes, by architecture."""
    grouped: dict[str, list[Usage]] = defaultdict(list)
    for u in usages:
        grouped[u.kernel].append(u)
    columns = "".join(f"{'sm_' + a:>8}" for a in architectures)
    print(f"{'kernel':<20}{'instances':>10}{columns}{'budget':>8}{'stack':>7}{'spills':>8}")
    for kernel, rows in sorted(grouped.items()):
        most = {a: max((u.registers for u in rows if u.arch == a), default=0) for a in architectures}
        cells = "".join(f"{most[a]:>8}" for a in architectures)
        instances = len({u.instance for u in rows})
        print(
            f"{kernel:<20}{instances:>10}{cells}{limits.get(kernel, '-'):>8}"
            f"{max(u.stack for u in rows):>7}{sum(u.spills for u in rows):>8}"
        )


def main() -> None:
    """Compile, print the table, exit with the list of broken rules."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every architecture: " + " ".join(EVERY))
    architectures = EVERY if parser.parse_args().all else COMMON
    results = compile_all(architectures)
    usages = [u for unit, (_, log) in results.items() if unit.arch for u in parse(log, unit.arch)]
    limits = budgets()
    print_table(usages, limits, architectures)
    broken = problems(usages, limits) + shared_too_little([target for target, _ in results.values()])
    if broken:
        sys.exit("\n".join(broken))
    print(f"{len(results)} compilations without a warning, no spills, every kernel within its budget")


if __name__ == "__main__":
    main()
