"""Says whether a kernel's checks tell a mutant from the unchanged kernels; test_mutants.py runs it, because a mutant
may hang or crash.

Usage: judge.py KERNEL UNCHANGED.so MUTANT.so; exit status 0: no difference seen, 3: caught.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from emulation import load
from kernel_cases import CHECKS, differ

CAUGHT = 3
SEEDS = range(3)


def main(kernel: str, unchanged: str, mutant: str) -> int:
    check, suspect = CHECKS[kernel], load(Path(mutant))
    want = check(load(Path(unchanged)), 0)
    for seed in SEEDS:
        try:
            got = check(suspect, seed)
        except RuntimeError as fault:
            print(f"seed {seed}: {fault}")
            return CAUGHT
        if differ(kernel, got, want):
            print(f"seed {seed}: other results")
            return CAUGHT
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
