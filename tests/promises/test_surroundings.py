"""Clock, time zone, locale and odd names: none of them changes a byte of what is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.stores import contents

pytestmark = pytest.mark.slow

# The wall clock stands still before 1970, and goes back by an hour at every look in the second half.
CLOCK = """
import itertools, time
before = itertools.chain([-1e9] * 50, itertools.count(-1e9, -3600))
time.time = lambda: next(before)
time.time_ns = lambda: int(next(before) * 1e9)
"""
RUN = "{clock}\nfrom unirank.cli.main import main\nmain()"
PLAIN = {"LC_ALL": "C.UTF-8", "TZ": "UTC"}
# A C locale in which Python may not help itself to UTF-8.
ASCII = {"LC_ALL": "C", "TZ": "UTC", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def compress(folder: Path, text: Path, environment: dict[str, str], clock: str = "") -> dict[str, bytes]:
    """What `unirank compress` writes in `folder`, which holds the model."""
    out, store = folder / "out", folder / "store"
    command = ["compress", folder / "model", "-r", "0.4", "-o", out, "--store", store, "--calib", text]
    command += ["--windows", 4, "--window", 16, "--batch", 2, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(clock=clock), *map(str, command)],
        env={key: value for key, value in os.environ.items() if not key.startswith("LC_")} | environment,
        capture_output=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    # The sources' paths stand in plan, card and provenance.
    here, inside = os.fsencode(folder), b"FOLDER"
    return {
        f"{part.name}/{name}": content.replace(here, inside)
        for part in (out, store)
        for name, content in contents(part).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    from tests.support.tiny import build

    path = tmp_path_factory.mktemp("plain")
    build("llama").save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def usual(folder: Path, text_file: Path) -> dict[str, bytes]:
    return compress(folder, text_file, PLAIN)


@pytest.mark.parametrize(
    ("environment", "clock", "stamp"),
    [
        pytest.param(ASCII, "", None, id="C locale without UTF-8"),
        pytest.param(
            {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati"}, "", 4e9, id="Turkish, 2096"
        ),
        pytest.param(PLAIN, CLOCK, 0.0, id="a clock that goes back, files of 1970"),
    ],
)
def test_nothing_around_changes_a_byte(
    environment: dict[str, str], clock: str, stamp: float | None, folder: Path, usual, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        if stamp is not None:
            os.utime(file, (stamp, stamp))
    assert compress(tmp_path, text_file, environment, clock) == usual


def test_names_in_any_script(folder: Path, usual, text_file: Path, tmp_path: Path) -> None:
    place = tmp_path / "Größe 模型 'x' (1)"
    shutil.copytree(folder / "model", place / "model")
    found = compress(place, text_file, PLAIN)
    assert found.keys() == usual.keys()
    assert {name: found[name] for name in usual if name.endswith(".safetensors")} == {
        name: usual[name] for name in usual if name.endswith(".safetensors")
    }
