"""Every `unirank` command and Python block of the README and the pages for users, run in order on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import unirank as library
from tests.support.command_line import Run
from tests.support.tiny import WORDS, build
from unirank.cli.main import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "docs/tutorial.md",
    "docs/how-to-choose.md",
    "docs/how-far.md",
    "docs/finetuning.md",
    "docs/serving.md",
    "docs/quantization.md",
    "docs/large-models.md",
)

# Of a model like the tiny one, where the pages have those of real ones.
AMOUNTS = {"100M": "20k", "200MB": "48kB", "256": "64"}


def steps(page: str) -> list[tuple[str, str]]:
    """("command" or "python", what stands there), in the order of the page."""
    found = []
    for block in re.finditer(r"^```python\n(.*?)^```|^    (unirank [^\n]*)", (ROOT / page).read_text(), re.M | re.S):
        python, command = block.groups()
        found.append(("python", python) if python else ("command", command.split(" #")[0].strip()))
    return found


def quick(code: str) -> str:
    """Python of a page, with the model that is there and little to do."""
    less = (("limit=16", "limit=1"), ("minutes=30", "presets=('unirank',)"))
    for shown, here in (("path/to/model", "MODEL"), ("steps=200", "steps=4"), ("windows=64", "windows=4"), *less):
        code = code.replace(shown, here)
    return code


@pytest.fixture
def workplace(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the pages take for granted: MODEL, texts, ranks, and for fine-tuning OUT."""
    build("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "MODEL")
    tokenizer.save_pretrained(tmp_path / "MODEL")
    for name, step in (("my-text.txt", 7), ("other-text.txt", 11), ("third-text.txt", 13)):
        text = " ".join(WORDS[2 + step * i % 94] for i in range(33_000))  # the default, 64 windows of 512
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def test_the_pages_show_every_command() -> None:
    shown = {shlex.split(step)[1] for page in PAGES for kind, step in steps(page) if kind == "command"}
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names - shown == {"demo"}  # `make demo`


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("page", PAGES)
def test_it_runs_as_written(page: str, workplace: Path, run_unirank: Run) -> None:
    ran, names = 0, {}  # a block may go on from the one before it
    if page in ("docs/finetuning.md", "docs/serving.md", "docs/quantization.md"):
        calibration = library.Calibration(text="my-text.txt", windows=6, window=24, batch=2)
        library.compress("MODEL", 0.3, calibration=calibration).save("OUT")
    for kind, step in steps(page):
        if kind == "python":
            for made in ("OUT", "TUNED"):
                if f'save("{made}")' in step:
                    shutil.rmtree(workplace / made, ignore_errors=True)
            exec(compile(quick(step), page, "exec"), names)
        else:
            arguments = shlex.split(step)[1:]
            if "-o" in arguments and (out := workplace / arguments[arguments.index("-o") + 1]).is_dir():
                shutil.rmtree(out)  # a page that makes OUT twice means two tries
            if "ranks.json" in arguments:
                plan = library.plan(library.open_store("STORE"), 0.3)
                (workplace / "ranks.json").write_text(json.dumps(dict(plan.ranks)))
            # 200 steps and 64 windows are the defaults and teach this test nothing that 4 do not.
            short = {"finetune": ["--steps", "4", "--window", "64"], "heal": ["--windows", "4", "--window", "64"]}
            short["eval"] = [] if "--tasks" in arguments or "--limit" in arguments else ["--limit", "4"]
            short["auto"] = [*short["heal"], "--evaluations", "2", "--preset", "unirank", "--preset", "fast"]
            arguments = [AMOUNTS.get(one, one) for one in arguments]
            more = short.get(arguments[0], short["heal"] if {"healed", "distilled"} & set(arguments) else [])
            code, _, err = run_unirank(*arguments, *more)
            assert (code, err) == (0, ""), step
        ran += 1
    assert ran >= 3
