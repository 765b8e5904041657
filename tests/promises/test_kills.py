"""Every command, harmed at random points: nothing half-written, nothing lost, and the same bytes when it is run again.

The points are seeded: a call of some function, or a byte of a file. UNIRANK_HARMS=20 tries that many of each kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import build

pytestmark = pytest.mark.slow

CHILD = Path(__file__).parents[1] / "support" / "harm_commands.py"
# Commands with what they write, in the directory of the try; BASE has what they read.
DATA = ["--calib", "BASE/words.txt", "--windows", "6", "--window", "24", "--batch", "2", "--device", "cpu"]
TRAINING = ["--steps", "4", "--batch", "2", "--window", "24", "--rank", "2", "--evaluate-every", "2"]
HEALING = ["--windows", "6", "--window", "24", "--passes", "1"]
QUIETLY = ["--no-speed", "--device", "cpu"]
PAGE = "small.html"  # comes behind the checkpoint; where it is missing, `unirank report` makes it
STAGES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "analyze": (["analyze", "BASE/dense", "-o", "store", *DATA], ("store",)),
    "analyze, gradients": (
        ["analyze", "BASE/dense", "-o", "store", "--scheme", "kfac", "--gradients", "4", *DATA],
        ("store",),
    ),
    "plan": (["plan", "BASE/store", "-r", "0.3", "-o", "plan.json"], ("plan.json",)),
    "compress": (["compress", "BASE/dense", "-r", "0.3", "-o", "small", *DATA], ("small", "small-analysis", PAGE)),
    "compress, replacing": (
        ["compress", "BASE/dense", "-r", "0.5", "-o", "small", "--overwrite", "--store", "BASE/store", *DATA],
        ("small", PAGE),
    ),
    "compress --stream": (
        ["compress", "BASE/dense", "-r", "0.3", "-o", "small", "--stream", *DATA],
        ("small", "small-analysis", PAGE),
    ),
    "finetune": (
        ["finetune", "BASE/small", "--data", "BASE/words.txt", "-o", "tuned", "--device", "cpu", *TRAINING],
        ("tuned",),
    ),
    "heal": (
        ["heal", "BASE/small", "--calib", "BASE/words.txt", "-o", "healed", "--device", "cpu", *HEALING],
        ("healed",),
    ),
    "eval": (
        ["eval", "small", "--against", "BASE/dense", "--text", "BASE/words.txt", "--limit", "1", *QUIETLY],
        ("small",),
    ),
    "quantize": (["quantize", "BASE/small", "-o", "eight", "--device", "cpu"], ("eight",)),
    "densify": (["densify", "BASE/small", "-o", "plain", "--device", "cpu"], ("plain",)),
    "report": (["report", "BASE/small", "-o", "page.html", "--store", "BASE/store"], ("page.html",)),
}


@dataclass(frozen=True)
class Done:
    code: int
    errors: str
    calls: int


class Commands:
    """The process that forks a child for every command."""

    def __init__(self, base: Path) -> None:
        self.base = base
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, place: Path, arguments: list[str], harm: str = "count", when: int = 0) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        given = [argument.replace("BASE", str(self.base)) for argument in arguments]
        self._process.stdin.write(json.dumps([str(place), given, harm, when]) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0


def tree(path: Path) -> dict[str, str]:
    """Hash of every file below, by its name; of a file, its own under an empty name."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {
        "" if file == path else str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def prepare(base: Path) -> Commands:
    """Inputs of every stage, made by the commands themselves."""
    commands = Commands(base)
    for name, arguments in (
        ("store", ["analyze", "BASE/dense", "-o", "BASE/store", *DATA]),
        ("small", ["compress", "BASE/dense", "-r", "0.3", "-o", "BASE/small", "--store", "BASE/store", *DATA]),
    ):
        done = commands.run(base, arguments)
        assert done.code == 0, (name, done.errors)
    return commands


def start(commands: Commands, stage: str, place: Path) -> dict[str, dict[str, str]]:
    """The directory of a try, and what is in it before."""
    place.mkdir()
    if stage in ("compress, replacing", "eval"):
        shutil.copytree(commands.base / "small", place / "small")
    return {name: tree(place / name) for name in STAGES[stage][1] if (place / name).exists()}


GROWING = ("store", "small-analysis")  # outputs that grow file by file, which is how they resume
PASSING = (".", "stream-", "forward-", "backward-")  # in them, only there while a later step needs it


def half_written(place: Path, before: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """What stands under a name of its own and is neither what was there before, nor what belongs there."""
    found = []
    for name, expected in whole.items():
        now = tree(place / name) if (place / name).exists() else None
        if name in GROWING:
            files = {file: content for file, content in (now or {}).items() if not file.startswith(PASSING)}
            found += [f"{name}/{file}" for file, content in files.items() if expected.get(file) != content]
        elif now is not None and name in before and expected.keys() >= before[name].keys():  # written into: `eval`
            files = {file: content for file, content in now.items() if not file.startswith(".")}
            known = before[name]
            found += [name for file, content in files.items() if content not in (known.get(file), expected.get(file))]
            found += [f"{name}/{file} (lost)" for file in known.keys() - now.keys()]
        elif now is not None and now not in (before.get(name), expected):
            found.append(name)
        elif now is None and name in before:
            found.append(f"{name} (lost)")
    return found


HARMS = ("kill", "kill in a write", "full disk", "interrupt")
# Exit codes; 0 where all was written before, or where Python ignores an interrupt: in a destructor.
CODES = {"kill": (-9,), "kill in a write": (-25, 0), "full disk": (5, 0), "interrupt": (130, 0)}


def survive(commands: Commands, stage: str, whole: dict[str, Any], harm: str, when: int) -> tuple[Done, list[str]]:
    """Harm one command, run it again, and say what is wrong with how it ended and with what it left."""
    arguments, outputs = STAGES[stage]
    place = commands.base / "try"
    before = start(commands, stage, place)
    done = commands.run(place, arguments, harm, when)
    wrong = [f"half-written or lost: {name}" for name in half_written(place, before, whole)]
    if done.code not in CODES[harm] or "Traceback" in done.errors:
        wrong.append(f"ended with {done.code}: {done.errors}")
    if harm == "full disk":  # no process died, so nothing may be left
        wrong += [f"left: {file.name}" for file in place.rglob(".*.tmp")]
    needed = [name for name in outputs if name != PAGE]
    if not all((place / name).exists() and tree(place / name) == whole[name] for name in needed):
        again = commands.run(place, arguments)
        if again.code != 0:
            wrong.append(f"run again, it ended with {again.code}: {again.errors}")
        else:
            wrong += [f"other bytes: {name}" for name in outputs if tree(place / name) != whole[name]]
        left = sorted(set(os.listdir(place)) - set(outputs))
        wrong += [f"left behind: {left}"] if left else []
    shutil.rmtree(place)
    return done, wrong


def undisturbed(commands: Commands, stage: str) -> tuple[int, dict[str, dict[str, str]], int]:
    """Calls of the command, hashes of its outputs, and the size of the largest file that it writes."""
    arguments, outputs = STAGES[stage]
    place = commands.base / "try"
    start(commands, stage, place)
    before = tree(place)
    done = commands.run(place, arguments)
    assert done.code == 0, done.errors
    whole = {name: tree(place / name) for name in outputs}
    written = [name for name, content in tree(place).items() if before.get(name) != content]
    largest = max((place / name).stat().st_size for name in written)
    shutil.rmtree(place)
    return done.calls, whole, largest


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, text_file: Path) -> Iterator[Commands]:
    base = tmp_path_factory.mktemp("kills")
    build("llama").save_pretrained(base / "dense")
    tokenizer.save_pretrained(base / "dense")
    shutil.copy(text_file, base / "words.txt")
    commands = prepare(base)
    yield commands
    commands.close()


# Of each kind, for each stage: with 3, 66 kills, half of them in the middle of a write, and as many other harms.
TRIES = int(os.environ.get("UNIRANK_HARMS", "3"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_harm_is_survived(stage: str, commands: Commands) -> None:
    calls, whole, largest = undisturbed(commands, stage)
    ended: Counter[tuple[str, int]] = Counter()
    wrong = []
    for harm in HARMS:
        points = random.Random(f"{stage}, {harm}")
        for _ in range(TRIES):
            when = 1 + int(points.random() * (calls if harm in ("kill", "interrupt") else largest))
            done, found = survive(commands, stage, whole, harm, when)
            ended[harm, done.code] += 1
            wrong += [f"{harm} at {when}: {what}" for what in found]
    print(f"{stage}:", ", ".join(f"{count} x {harm} ({code})" for (harm, code), count in ended.items()))
    assert not wrong, "\n".join(wrong)
    for harm in HARMS:
        # The figures of `eval` were shown: that they could not be recorded is a note.
        code = 0 if (stage, harm) == ("eval", "full disk") else CODES[harm][0]
        assert ended[harm, code], f"no {harm} came to pass"
