"""Every example runs as its docstring says, in order, on a tiny model; ecosystem.py is tested beside lm-eval."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.tiny import WORDS, build

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# In the order in which a user would: each finds what those before it made.
ORDER = (
    "compress",
    "plan_ratios",
    "add_allocator",
    "evaluate",
    "heal",
    "finetune",
    "densify",
    "serve_with_transformers",
)
PUBLIC = {"unirank", "torch", "transformers"}  # an example has to do with these


def command(name: str) -> list[str]:
    """The arguments of the command that the docstring of an example shows."""
    said = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text()), clean=False) or ""
    shown = re.findall(rf"^    python (examples/{name}\.py .*)$", said, re.M)
    assert len(shown) == 1, f"{name} shows {len(shown)} commands"
    return shlex.split(shown[0])


@pytest.fixture
def workplace(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the commands name: MODEL and two texts."""
    build("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "MODEL")
    tokenizer.save_pretrained(tmp_path / "MODEL")
    for seed, name in enumerate(("my-text.txt", "other-text.txt")):
        text = " ".join(WORDS[2 + (7 + seed) * i % 94] for i in range(33_000))  # the default, 64 windows of 512
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def test_there_is_one_for_every_task() -> None:
    assert {path.stem for path in EXAMPLES} == {*ORDER, "ecosystem"}


@pytest.mark.parametrize("name", ORDER)
def test_it_uses_the_public_face_alone(name: str) -> None:
    tree = ast.parse((ROOT / "examples" / f"{name}.py").read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = {module for module in modules if module.split(".")[0] not in sys.stdlib_module_names}
    assert "unirank" in ours
    assert ours <= PUBLIC
    private = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    assert not private


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_all_run_as_written(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for name in ORDER:
        script, *arguments = command(name)
        if "-o" in arguments and (made := workplace / arguments[arguments.index("-o") + 1]).is_dir():
            shutil.rmtree(made)  # two examples make OUT
        # 200 steps teach this test nothing that 4 do not.
        arguments += {"finetune": ["--steps", "4", "--window", "64"], "heal": ["--window", "64"]}.get(name, [])
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        said[name] = capsys.readouterr().out
    assert "removed: 20" in said["compress"]
    assert said["plan_ratios"].count("%") == 2 * 2 * 2  # two ratios, two allocators, two columns
    assert "parameters kept: 30" in said["add_allocator"]
    assert {"my-text.txt", "other-text.txt"} <= set(said["evaluate"].split())
    assert "squared relative error" in said["heal"]
    assert "nats a token" in said["finetune"]
    assert type(AutoModelForCausalLM.from_pretrained("DENSE").model.layers[0].mlp.up_proj).__name__ == "Linear"
    assert said["serve_with_transformers"].strip()
