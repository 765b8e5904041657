"""Each planted fault must be noticed: the emulator and its tests are only as good as what they catch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulation import DRIVERS, EMULATOR, KERNELS, Builder
from kernel_cases import CHECKS
from mutants.faults import FAULTS, Fault

JUDGE = Path(__file__).parent / "mutants" / "judge.py"
CAUGHT = 3


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of the kernels with the fault in it."""
    kernels = folder / "kernels"
    shutil.copytree(KERNELS, kernels)
    path = kernels / fault.file
    source = path.read_text()
    assert source.count(fault.search) == 1, f"{fault.file} does not hold once: {fault.search}"
    path.write_text(source.replace(fault.search, fault.replace))
    return kernels


def judge(fault: Fault, folder: Path, builder: Builder, unchanged: Path) -> tuple[bool, str]:
    """Whether the fault was caught, and how."""
    others = [builder.object(EMULATOR / f"{name}_driver.cpp") for name in DRIVERS if name != fault.kernel]
    mutated = Builder(builder.cache, plant(fault, folder)).object(EMULATOR / f"{fault.kernel}_driver.cpp", "-O0", "-w")
    command = [sys.executable, str(JUDGE), fault.kernel, str(unchanged), str(builder.module([mutated, *others]))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return True, "hangs"
    if done.returncode < 0:
        return True, f"crashes with signal {-done.returncode}"
    assert done.returncode in (0, CAUGHT), done.stderr
    return done.returncode == CAUGHT, done.stdout.strip()


def test_unchanged_kernels_pass_the_judge(emulated_path: Path) -> None:
    for kernel in CHECKS:
        command = [sys.executable, str(JUDGE), kernel, str(emulated_path), str(emulated_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kernel", CHECKS)
def test_every_planted_fault_is_caught(kernel: str, builder: Builder, emulated_path: Path, tmp_path: Path) -> None:
    faults = [fault for fault in FAULTS if fault.kernel == kernel]
    folders = [tmp_path / str(i) for i in range(len(faults))]
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda pair: judge(*pair, builder, emulated_path), zip(faults, folders, strict=True)))
    for fault, (caught, how) in zip(faults, verdicts, strict=True):
        print(f"{'caught' if caught else 'MISSED'}: {fault.file}: {fault.why}: {how}")
    print(f"{kernel}: {sum(caught for caught, _ in verdicts)} of {len(faults)} planted faults caught")
    missed = [fault.why for fault, (caught, _) in zip(faults, verdicts, strict=True) if not caught]
    assert not missed
