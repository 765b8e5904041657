"""The import rule: a module imports only what stands left of it, so that data flows in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import unirank

ROOT = Path(unirank.__file__).parent
# Modules of one group may not import each other.
ORDER = (
    ("errors", "progress", "provenance", "strictjson"),
    ("types", "distributed"),
    ("reference",),
    ("ops",),
    ("files",),
    ("tensorfile",),
    ("modules",),
    ("embedded",),
    ("pages",),
    ("shards",),
    ("models",),
    ("sources",),
    ("data",),
    ("corpus", "adapters"),
    ("trace",),
    ("calibrate",),
    ("schemes",),
    ("decompose",),
    ("store",),
    ("gradients",),
    ("analyze",),
    ("score", "estimate"),
    ("hf",),
    ("truncate",),
    ("refine",),
    ("evaluate",),
    ("allocators",),
    ("allocate", "imported", "workbench"),
    ("presets", "card"),
    ("checkpoint",),
    ("api", "densify", "fuse"),
    ("losses",),
    ("training",),
    ("finetune",),
    ("correlation", "spectra", "harness"),
    ("diagnose",),
    ("pictures",),
    ("report",),
    ("demo", "info"),
    ("tables", "flags", "session"),
    ("cli_compressed", "cli_looking"),
    ("cli",),
    ("run",),
)
LEVEL = {name: level for level, group in enumerate(ORDER) for name in group}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unirank":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("unirank.")}
    return names


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_module_has_its_place() -> None:
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()} == LEVEL.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_left_of_it(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    wrong = {name for name in imported(path) if name != own and LEVEL[name] >= LEVEL[own]}
    assert not wrong
