"""What `make gpu-check` found, as docs/gpu-results.md, as text, or as an exit code.

    python tools/gpu_results.py gpu-out [gpu-out-of-another ...]   keep the figures and write the page
    python tools/gpu_results.py                                    write the page again from what is kept
    python tools/gpu_results.py --summary gpu-out                  print all answers
    python tools/gpu_results.py --failed gpu-out                   exit with 1 where a step or an answer failed

Figures are kept in docs/gpu-results.json, by the name of the device. It needs no package.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT, PAGE = ROOT / "docs" / "gpu-results.json", ROOT / "docs" / "gpu-results.md"
HEAD = """# Results on GPUs

Made by `python tools/gpu_results.py`, do not edit. On a machine with a GPU, `make gpu-check` builds, tests, compares
with the CPU and measures, offline and in ten minutes; `python tools/gpu_results.py gpu-out` writes what it found here.
"""
NOTHING = """
**Nothing has run on a GPU yet.** There are no figures. [Verification](verification.md) says what is proven without
one, and [large models](large-models.md) what a model of the hardware expects.
"""
TITLES = {
    "env": "What the machine can do",
    "smoke": "Every op, against the CPU or float64",
    "compositions": "The same by the torch compositions",
    "parity": "The whole path on tiny models, against the CPU",
    "layers": "An analysis of two layers",
    "solvers": "Eigenproblems and what is around them",
    "kernels": "Rates and errors of the ops",
    "nan": "Input that is not finite",
    "sanitize": "compute-sanitizer",
    "whole": "Whole models",
    "profile": "Profile",
}
_HIDDEN = ("step", "name", "at", "trace")


def lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines; a line that was cut off by a kill is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def read(out: Path) -> dict[str, Any]:
    """One run: `device`, `steps`, `answers`, and `tests` with how many passed, failed and were left out."""
    answers, tests = lines(out / "results.jsonl"), None
    if (out / "junit.xml").exists():
        suite = next(ElementTree.parse(out / "junit.xml").iter("testsuite"))  # our own file
        total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        tests = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
    device = next((row["gpu"] for row in answers if row["name"] == "gpu"), "CPU, tiny")
    return {"device": device, "steps": lines(out / "steps.jsonl"), "answers": answers, "tests": tests}


def failures(run: dict[str, Any]) -> list[str]:
    """Names of steps that did not end well, or had no time, and of answers that are errors."""
    steps = [f"{step['step']} ended with {step['code']}" for step in run["steps"] if step["code"] != 0]
    return steps + [f"{row['step']}: {row['name']}" for row in run["answers"] if not row.get("ok", True)]


def shown(value: Any) -> str:
    """A value in a table, or in the summary."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value).replace("|", "/").replace("\n", " ")[:160]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def summary(run: dict[str, Any]) -> str:
    """Everything, a line each."""
    found = [f"{s['step']:<14}{s['code']:>4}{s['seconds']:>6} s of {s['limit']}" for s in run["steps"]]
    if run["tests"]:
        found.append(", ".join(f"{count} {what}" for what, count in run["tests"].items()))
    for row in run["answers"]:
        values = ", ".join(f"{key} {shown(value)}" for key, value in row.items() if key not in (*_HIDDEN, "ok"))
        found.append(f"{'' if row.get('ok', True) else 'FAILED '}[{row['step']}] {row['name']}: {values}")
    bad = failures(run)
    return "\n".join([*found, f"{len(bad)} failed: {'; '.join(bad)}" if bad else "Nothing failed."])


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = [key for key in rows[0] if key not in _HIDDEN]
    head = ["", "| | " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    return head + [f"| {row['name']} | " + " | ".join(shown(row[key]) for key in keys) + " |" for row in rows]


def section(run: dict[str, Any]) -> str:
    """One device's part of the page: rows with the same keys that follow each other are a table."""
    found = ["", f"## {run['device']}", ""]
    bad = failures(run)
    found.append(f"Failed or cut off: {'; '.join(bad)}." if bad else "Every step ran to its end.")
    if run["tests"]:
        found.append(f"\nTests: {', '.join(f'{count} {what}' for what, count in run['tests'].items())}.")
    ended = [row for row in run["answers"] if not row["name"].startswith("progress, ")]
    paces = {row["name"]: row for row in run["answers"] if row["name"].startswith("progress, ")}
    answers = sorted([*ended, *paces.values()], key=lambda row: list(TITLES).index(row["step"]))
    for step, rows in groupby(answers, lambda row: row["step"]):
        found += ["", f"### {TITLES[step]}"]
        for _, alike in groupby(rows, lambda row: [key for key in row if key not in _HIDDEN]):
            found += _table(list(alike))
    return "\n".join(found)


def page(kept: dict[str, Any]) -> str:
    """The whole page."""
    return HEAD + ("".join(section(run) + "\n" for run in kept.values()) if kept else NOTHING)


def main(arguments: Sequence[str]) -> int:
    """As the module's docstring says."""
    if arguments[:1] in (["--summary"], ["--failed"]):
        run = read(Path(arguments[1]))
        if arguments[0] == "--summary":
            print(summary(run))
            return 0
        return 1 if failures(run) else 0
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for out in arguments:
        run = read(Path(out))
        kept[run["device"]] = run
    if kept:
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(page(kept))
    print(PAGE.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
