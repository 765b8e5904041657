"""The rule between the rooms: a room imports only rooms that stand left of it, so that data flows in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import unirank

ROOT = Path(unirank.__file__).parent
# Rooms and root modules from left to right. Within a group the order is that of the names: each may import those before
# it. `|` stands between rooms that never import each other.
ORDER = (
    "errors, progress, estimate, display, provenance, looks",
    "queues, disk, types, reference, distributed, libraries, matmul, ops, costs, experts",
    "models | layerwise | rank_plan",
    "text",
    "analysis | evaluation",
    "planning | compression | diagnosis",
    "finetuning | report",
    "recipes, stages",
    "inputs, demands, job",
    "tradeoff",
    "api",
    "serving | cli",
    "run",
)
# Methods of an object that a person has at hand, for what lies right of it: imported when they are called, not before.
SHORTCUTS = {"compression/checkpoint.py": {"tradeoff"}, "evaluation/measured_curve.py": {"tradeoff"}}
PLACE = {
    name.strip(): (level, position if "," in group else 0)
    for level, group in enumerate(ORDER)
    for position, name in enumerate(group.replace("|", ",").split(","))
}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path, *, outside_of_functions: bool = False) -> set[str]:
    """Rooms that a module imports, anywhere in it, also for its types alone; or when it is imported itself."""
    names, tree = set(), ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and outside_of_functions
        for node in ast.walk(function)
    }
    for node in (node for node in ast.walk(tree) if id(node) not in inside):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unirank":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("unirank.")}
    return names


def test_every_module_has_its_place() -> None:
    assert {room_of(path) for path in modules()} <= PLACE.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_stands_left_of_it(path: Path) -> None:
    own, shortcuts = room_of(path), SHORTCUTS.get(path.relative_to(ROOT).as_posix(), set())
    wrong = {name for name in imported(path) if name != own and name in PLACE and PLACE[name] >= PLACE[own]}
    assert wrong == shortcuts
    assert not shortcuts & imported(path, outside_of_functions=True)


def test_no_module_has_the_name_of_a_public_function() -> None:
    """`import unirank.x as m` must give the module x, and `unirank.x` the function."""
    functions = {name for name in unirank.__all__ if callable(getattr(unirank, name))}
    names = {path.parent.name if path.name == "__init__.py" else path.stem for path in modules()}
    assert not functions & names


def test_every_room_says_what_it_is_for() -> None:
    for room in (path for path in ROOT.iterdir() if (path / "__init__.py").is_file()):
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert said, room
        assert said.startswith(f"{room.name}: ")
        for part in ("\nIn: ", "\nOut: ", "\nHere one may ", "\nChanged most often: "):
            assert part in f"{said}\n", (room.name, part)


def test_no_test_module_imports_another() -> None:
    folder = ROOT.parent / "tests"
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                assert not (node.module or "").split(".")[-1].startswith("test_"), (path, node.module)
