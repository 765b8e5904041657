"""Assert on the machine code of the kernels what their comments promise: wide loads, shuffles, atomics where meant.

Disassembles the objects of `tools/check_cuda.py` (compiling what is missing) with NVIDIA's cuobjdump; no GPU is needed.
A kernel that no rule names is an error, so a new one cannot slip through.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import check_cuda
import cuda_headers

# Global and shared atomics, and the reductions that are atomics without an answer.
ATOMIC = r"(ATOM|ATOMG|ATOMS|RED|REDG)\b"
LOCAL_MEMORY = r"(LDL|STL)\b"
SHUFFLE = r"SHFL\b"
WIDE_LOAD = r"LDG\.E(\.\w+)*\.128\b"
BARRIER = r"BAR\b"


@dataclass(frozen=True)
class Rule:
    """What the instructions of a kernel must and must not contain, as patterns of opcodes.

    `wide_where` selects the instances that promise 16-byte loads, by a pattern of the demangled name.
    """

    must: tuple[str, ...] = ()
    atomics: bool = False
    wide_where: str | None = None


RULES = {
    "cosine_rows": Rule(must=(SHUFFLE,), wide_where=r"true>$"),
    "add_cosines": Rule(must=(SHUFFLE, BARRIER)),
    "column_sums": Rule(must=(BARRIER,)),
    "add_partials": Rule(),
    "add_lower": Rule(),
    "mirror_lower": Rule(must=(BARRIER,)),
    "find_not_finite": Rule(atomics=True),
    "turn_square": Rule(must=(BARRIER,)),
    "check_segments": Rule(must=(BARRIER,), atomics=True),
    "make_keys": Rule(atomics=True),
    "price_steps": Rule(),
    "buy_prefix": Rule(atomics=True),
    "settle_ranks": Rule(must=(SHUFFLE, BARRIER)),
}


def functions(target: Path) -> dict[str, list[str]]:
    """Opcodes of every function in an object, by demangled name."""
    tool = cuda_headers.cuobjdump()
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    dump = subprocess.run([tool, "-sass", target], capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in dump.splitlines():
        if header := re.match(r"\s*Function : (\w+)", line):
            current = found.setdefault(header.group(1), [])
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            current.append(code.group(1))
    return dict(zip(check_cuda.demangle(list(found)), found.values(), strict=True))


def broken(kernel: str, instance: str, opcodes: list[str]) -> list[str]:
    """What one kernel instance does against its rule."""
    rule = RULES.get(kernel)
    if rule is None:
        return [f"{kernel} has no rule: add one to RULES in tools/check_sass.py"]

    def has(pattern: str) -> bool:
        return any(re.match(pattern, opcode) for opcode in opcodes)

    wide = rule.wide_where is not None and re.search(rule.wide_where, instance) is not None
    checks = (
        (bool(opcodes), "has no code"),
        (not has(LOCAL_MEMORY), "uses local memory"),
        (has(ATOMIC) == rule.atomics, "has no atomics" if rule.atomics else "uses atomics"),
        (not wide or has(WIDE_LOAD), "has no 16-byte loads"),
        *((has(pattern), f"has no {pattern}") for pattern in rule.must),
    )
    return [f"{instance} {complaint}" for good, complaint in checks if not good]


def main() -> None:
    """Disassemble, print what was found, exit with the list of broken rules."""
    results = check_cuda.compile_all(check_cuda.COMMON)
    complaints: list[str] = []
    seen: dict[str, set[str]] = {}
    instances = 0
    for unit, (target, _) in results.items():
        # linalg.cu has no kernel of its own: its work is cuSOLVER's.
        if unit.arch is None or unit.source.stem == "linalg":
            continue
        for name, opcodes in functions(target).items():
            kernel = check_cuda.kernel_name(name)
            if kernel is None:
                continue
            instances += 1
            complaints += [f"sm_{unit.arch}: {c}" for c in broken(kernel, check_cuda.short(name), opcodes)]
            kinds = {"LDG.128": WIDE_LOAD, "SHFL": SHUFFLE, "atomics": ATOMIC, "BAR": BARRIER}
            seen.setdefault(kernel, set()).update(
                label for label, pattern in kinds.items() if any(re.match(pattern, o) for o in opcodes)
            )
    complaints += [f"the rule of {kernel} is for no kernel that exists" for kernel in RULES.keys() - seen.keys()]
    for kernel, kinds in sorted(seen.items()):
        print(f"{kernel:<20}{' '.join(sorted(kinds))}")
    if complaints:
        sys.exit("\n".join(sorted(set(complaints))))
    print(f"{instances} kernel instances: no local memory, every rule of tools/check_sass.py holds")


if __name__ == "__main__":
    main()
