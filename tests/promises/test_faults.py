"""Bad input is refused in one sentence, before anything expensive runs and before anything is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.tiny import build
from unirank import Calibration, InputError, ScoreSettings
from unirank.cli.demo import demo
from unirank.cli.main import main

REMOVE = "at least 0 and less than 1"
# Changed arguments -> what the message must hold: what was got, and what is legal.
COMMON: list[tuple[dict[str, Any], str]] = [
    ({"remove": -0.1}, rf"remove = -0\.1 .*{REMOVE}"),
    ({"remove": 1}, rf"remove = 1.* .*{REMOVE}"),
    ({"remove": 1.5}, rf"remove = 1\.5 .*{REMOVE}"),
    ({"remove": float("nan")}, rf"remove = nan .*{REMOVE}"),
    ({"remove": float("inf")}, rf"remove = inf .*{REMOVE}"),
    ({"min_rank": 0}, r"min_rank = 0 .*at least 1"),
    ({"multiple_of": 0}, r"multiple_of = 0 .*at least 1"),
    ({"min_rank": 13, "remove": 0.4}, r"remove = 0\.4 .*min_rank = 13 .*needs \d+ parameters.*budget is 13824"),
    ({"min_rank": 2, "multiple_of": 16, "remove": 0.4}, r"min_rank = 2 .*multiple_of = 16 .*budget is 13824"),
    ({"min_rank": 13, "remove": 0.4, "allocator": "uniform"}, r"min_rank = 13 .*budget is 13824"),
    ({"scheme": "magic"}, r"'magic'.*legal values: .*whiten"),
    ({"allocator": "magic"}, r"'magic'.*legal values: .*unirank"),
    ({"importance": "magic"}, r"importance = 'magic'.*sublayer, block, none"),
    ({"distance": "magic"}, r"distance = 'magic'.*cosine, angular"),
    ({"local": "magic"}, r"local = 'magic'.*energy, sigma, absolute, global-only"),
    ({"gamma": float("nan")}, r"gamma = nan .*finite and at least 0"),
    ({"gamma": -1.0}, r"gamma = -1\.0 .*finite and at least 0"),
    ({"windows": 0}, r"windows = 0 .*at least 1"),
    ({"window": 1}, r"window of 1 tokens .*at least 2"),
    ({"window": 5000}, r"4000 tokens, windows of 5000 need at least 5001"),
    ({"batch": 0}, r"batch = 0 .*at least 1"),
    ({"dtype": "int8"}, r"dtype = 'int8' .*auto, float32, bfloat16, float16"),
    ({"model": "no-such-directory"}, r"'no-such-directory'.*neither a local directory"),
    ({"model": "EMPTY"}, r"no config\.json"),
    ({"calib": "missing.txt"}, r"'missing\.txt' is not a file.*builtin"),
    ({"calib": "EMPTY_FILE"}, r"is empty"),
    ({"calib": "BINARY"}, r"is not UTF-8"),
]


@pytest.fixture
def place(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a foreign directory, a file and unusable texts, in a world where calibrating is a failure."""
    monkeypatch.setattr("unirank.analysis.fill_store.record", lambda *_, **__: pytest.fail("calibration began"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    folder = tmp_path / "work"
    (folder / "theirs").mkdir(parents=True)
    (folder / "theirs" / "thesis.txt").write_text("years of work")
    (folder / "empty").mkdir()
    (folder / "file").write_text(" \n")
    (folder / "binary").write_bytes(b"\xff\xfe\xff")
    return folder


def filled(changes: dict[str, Any], place: Path) -> dict[str, Any]:
    """The changes, with stand-ins for paths replaced."""
    paths = {"EMPTY": place / "empty", "EMPTY_FILE": place / "file", "BINARY": place / "binary"}
    return {key: str(paths.get(value, value)) if isinstance(value, str) else value for key, value in changes.items()}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def compress(model_dir: Path, text_file: Path, store: Path, **changes: Any) -> None:
    """`unirank.compress` with the flat arguments of the command line."""

    def taken(*names: str) -> dict[str, Any]:
        return {name: changes.pop(name) for name in names if name in changes}

    calibration = Calibration(
        **({"text": changes.pop("calib", str(text_file)), "windows": 4, "window": 16, "batch": 2})
        | taken("windows", "window", "batch")
    )
    settings = ScoreSettings(**taken("importance", "distance", "gamma", "local"))
    model, remove = changes.pop("model", str(model_dir)), changes.pop("remove", 0.3)
    unirank.compress(model, remove, settings=settings, calibration=calibration, store=store, device="cpu", **changes)


@pytest.mark.parametrize(("changes", "message"), [*COMMON, ({"remove": "x"}, rf"remove = 'x' .*{REMOVE}")])
def test_the_library_refuses(changes, message, place: Path, model_dir: Path, text_file: Path) -> None:
    before = contents(place)
    with pytest.raises(InputError, match=message):
        compress(model_dir, text_file, place / "store", **filled(changes, place))
    assert contents(place) == before


def refuse(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    """Run the command line and expect code 2, silence on stdout, and the message on stderr."""
    monkeypatch.setattr(sys, "argv", ["unirank", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, ""), err
    assert re.search(message, err), err


@pytest.mark.parametrize(("changes", "message"), [*COMMON, ({"remove": "x"}, r"--remove")])
def test_compress_refuses(changes, message, place: Path, model_dir: Path, text_file, monkeypatch, capsys) -> None:
    before = contents(place)
    options = {"remove": 0.3, "calib": text_file, "windows": 4, "window": 16, "batch": 2, "out": place / "out"}
    options |= filled(changes, place)
    model = options.pop("model", model_dir)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    refuse(["compress", str(model), "--device=cpu", *flags], message, monkeypatch, capsys)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("compress", "theirs", "not made by unirank"),
        ("compress", "file", "not a directory"),
        ("compress", "file/below", "not a directory"),
        ("compress", "file/far/below", "not a directory"),
        ("analyze", "theirs", "not made by unirank"),
        ("analyze", "file", "not a directory"),
        ("analyze", "file/below", "not a directory"),
        ("demo", "theirs", "not made by unirank"),
        ("demo", "file", "not a directory"),
        ("demo", "file/below", "not a directory"),
    ],
)
def test_an_output_that_is_not_ours_is_refused(
    command, out, message, place: Path, model_dir: Path, text_file: Path, monkeypatch, capsys
) -> None:
    before = contents(place)
    arguments = {
        "compress": [str(model_dir), "-r", "0.3", f"--calib={text_file}", "--windows=4", "--window=16", "--overwrite"],
        "analyze": [str(model_dir), f"--calib={text_file}", "--windows=4", "--window=16", "--overwrite"],
        "demo": [],
    }[command]
    refuse([command, *arguments, "--device=cpu", "-o", str(place / out)], message, monkeypatch, capsys)
    assert contents(place) == before


def test_a_store_that_is_not_ours_is_refused(place: Path, model_dir: Path, text_file: Path) -> None:
    before = contents(place)
    for store, message in (("theirs", "not made by unirank"), ("file", "not a directory")):
        with pytest.raises(InputError, match=message):
            compress(model_dir, text_file, place / store)
    assert contents(place) == before


def test_a_demo_that_cannot_start_leaves_nothing(place: Path) -> None:
    before = contents(place)
    for changes in ({"model": "no-such-directory"}, {"remove": (0.2, 1.5)}):
        with pytest.raises(InputError):
            demo(place / "out", device="cpu", **changes)
    assert contents(place) == before


def test_a_model_in_memory_needs_its_tokenizer() -> None:
    with pytest.raises(InputError, match="tokenizer="):
        unirank.compress(build("llama"), 0.3)


def test_the_good_twin_of_the_table_would_calibrate(place: Path, model_dir: Path, text_file: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="calibration began"):
        compress(model_dir, text_file, place / "store")


@pytest.mark.parametrize("where", ["cpu", "gpu", "python"])
def test_out_of_memory_says_what_to_lower(
    where: str, model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def greedy(*_: object, **__: object) -> None:
        if where == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.") if where == "gpu" else MemoryError("no room.")

    monkeypatch.setattr("unirank.analysis.fill_store.calibrate_layer", greedy)
    arguments = ["analyze", str(model_dir), "-o", str(tmp_path / "store"), "--calib", str(text_file), "--windows", "4"]
    monkeypatch.setattr(sys, "argv", ["unirank", *arguments, "--window", "16", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert re.match("error: Out of memory: .* A smaller --batch or --window needs less, --stream", said)
    assert said.count("\n") == 1
