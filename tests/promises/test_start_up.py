"""What does not need torch or transformers does not import them; the checkpoint format is known all the same."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import unirank
from unirank.cli.main import app

pytestmark = pytest.mark.slow

ROOT = Path(unirank.__file__).parent
CHECKPOINT = Path(__file__).parents[1] / "data" / "0.1.0-before-rooms" / "checkpoint"
RUN = """
import atexit, json, sys
atexit.register(lambda: print("\\nHEAVY", json.dumps(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))))
sys.argv = ["unirank", *sys.argv[1:]]
from unirank.cli.main import main
main()
"""
COMMANDS = [str(command.name) for command in app.registered_commands]


def heavy(*arguments: object, code: int = 0) -> list[str]:
    """Which of the large packages a command has imported when it ends."""
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout.rpartition("HEAVY ")[2])


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)])
def test_looking_at_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert heavy(*arguments) == []


@pytest.mark.parametrize(
    "arguments", [["compress", "--no-such"], ["plan"], ["nothing"], ["eval", "m", "--window", "x"]]
)
def test_nor_does_what_was_typed_wrong(arguments: list[str]) -> None:
    assert heavy(*arguments, code=2) == []


def test_a_plan_needs_no_transformers(model_dir: Path, text_file: Path, calibration, tmp_path: Path) -> None:
    store = unirank.analyze(str(model_dir), tmp_path / "store", calibration=calibration, device="cpu")
    for allocator in ("unirank", "uniform", "tolerance"):
        used = heavy("plan", store.path, "-r", "0.3", "--allocator", allocator, "--json")
        assert set(used) <= {"torch", "numpy"}  # numpy comes with torch


@pytest.mark.parametrize(
    "order",
    [
        "import unirank",
        "import transformers, unirank",
        "import unirank, transformers",
        "import unirank, torch, transformers.modeling_utils",
        "import transformers.quantizers.auto, unirank",
        "import transformers.modeling_utils, unirank, unirank.cli.main",
        "import unirank.errors",
        "import unirank.models.quantizer",
        "from unirank import UniRankConfig",
        "from unirank.compression import truncation",
        "import unirank; unirank.load",
    ],
)
def test_the_format_is_known_in_whatever_order_things_are_imported(order: str) -> None:
    code = f"""
{order}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r})
kinds = {{type(module).__name__ for module in model.modules()}}
assert "LowRankLinear" in kinds, kinds
import transformers.quantizers.auto as methods
assert methods.__loader__ is methods.__spec__.loader and "unirank" not in type(methods.__loader__).__module__
"""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_where_the_package_says() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        (str(node.module).removeprefix("unirank").lstrip("."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    said = {(home, name) for home, names in unirank._HOME.items() for name in names}
    assert typed == said | {("", "ops"), ("", "reference")}
    assert sorted(unirank.__all__) == sorted({name for _, name in typed} | {"__version__"})
    assert set(unirank.__all__) <= set(dir(unirank))
    for name in unirank.__all__:
        assert getattr(unirank, name) is getattr(unirank, name)
    with pytest.raises(AttributeError, match="module 'unirank' has no attribute 'nothing'"):
        _ = unirank.nothing  # pyright: ignore[reportAttributeAccessIssue]
