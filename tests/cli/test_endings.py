"""The last lines of every command: the numbers that matter, and the next command, which works as printed."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import typer

from tests.support.command_line import Run
from unirank.cli import endings
from unirank.cli.main import app


def parsed(out: str) -> list[str]:
    """The arguments of the last line, a command that the command line takes."""
    last = out.rstrip("\n").splitlines()[-1]
    assert last.startswith("Next: unirank "), last
    arguments = shlex.split(last.removeprefix("Next: unirank "))
    command = typer.main.get_command(app).commands[arguments[0]]  # pyright: ignore[reportAttributeAccessIssue]
    command.make_context(arguments[0], arguments[1:])  # raises for what it does not know
    return arguments


@pytest.fixture
def place(model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose name has to be quoted, with a model and a text; commands run on the CPU."""
    folder = tmp_path / "my models"
    shutil.copytree(model_dir, folder / "tiny")
    shutil.copy(text_file, folder / "text.txt")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.filterwarnings("ignore::unirank.errors.UnirankWarning")
def test_every_command_says_what_comes_next(run_unirank: Run, place: Path) -> None:
    calibrate = ["--calib", place / "text.txt", "--windows", 4, "--window", 24, "--batch", 2]
    shown = ["--text", place / "text.txt", "--window", 24, "--limit", 2, "--no-speed"]

    def run(*arguments: object) -> tuple[str, list[str]]:
        code, out, err = run_unirank(*arguments)
        assert code == 0, err
        return out, parsed(out)

    store, small = place / "a store", place / "small"
    _, then = run("analyze", place / "tiny", "-o", store, *calibrate)
    assert then == ["plan", str(store), "--remove", "0.2"]
    _, then = run(*then)  # as printed
    assert then[:3] == ["compress", "MODEL", "-o"]
    out, then = run(*[str(place / "tiny") if part == "MODEL" else part for part in then])
    assert "Removed 20." in out
    assert (place / "a store-compressed" / "rank_plan.json").is_file()
    assert then == ["eval", "a store-compressed", "--against", str(place / "tiny")]

    out, then = run("compress", place / "tiny", "-r", 0.4, "-o", small, "--store", store)
    size = (small / "model.safetensors").stat().st_size / 1e6
    assert f"{size:,.1f} MB now" in out
    assert then == ["eval", str(small), "--against", str(place / "tiny")]
    out, then = run(*then, *shown)
    assert f"{size:,.1f}" in out
    assert then[:2] in (["heal", str(small)], ["quantize", str(small)])  # of random models either can be
    record = json.loads(run_unirank("eval", small, "--against", place / "tiny", *shown, "--json")[1])
    dense, compressed = record["rows"]
    assert dense["ratio"] == 1
    assert compressed["ratio"] == compressed["perplexity"] / dense["perplexity"]
    assert compressed["mb"] == pytest.approx(size)
    assert compressed["mb"] < dense["mb"]

    assert run("eval", place / "tiny", *shown)[1][:2] == ["compress", str(place / "tiny")]
    assert run("diagnose", store)[1] == ["plan", str(store), "--remove", "0.2"]
    assert run("report", small, "-o", place / "page.html")[1][0] in ("quantize", "report")
    assert run("info")[1] == ["demo"]


@pytest.mark.filterwarnings("ignore::unirank.errors.UnirankWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_so_do_those_that_go_on_from_a_checkpoint(run_unirank: Run, place: Path) -> None:
    text, small = place / "text.txt", place / "small"
    calibrate = ["--calib", text, "--windows", 4, "--window", 24]
    assert run_unirank("compress", place / "tiny", "-r", 0.4, "-o", small, *calibrate, "--no-report")[0] == 0
    for command, against in (
        (["heal", small, "-o", "healed", *calibrate, "--passes", 1], place / "tiny"),
        (["finetune", small, "-o", "tuned", "--text", text, "--window", 24, "--steps", 1], place / "tiny"),
        (["quantize", small, "-o", "int8"], small),
        (["densify", small, "-o", "plain"], small),
    ):
        code, out, err = run_unirank(*command)
        assert code == 0, err
        assert parsed(out) == ["eval", str(command[3]), "--against", str(against)]
        assert "On disk: " in out
        code, out, err = run_unirank(*command, "--overwrite", "--json")
        assert code == 0, err
        record = json.loads(out)
        size = sum(file.stat().st_size for file in Path(str(command[3])).glob("*.safetensors")) / 1e6
        assert record["mb_after"] == pytest.approx(size)
        assert record["mb_before"] > 0
    shown = ["--text", text, "--window", 24, "--limit", 2]
    code, out, err = run_unirank("eval", "int8", *shown)
    assert code == 0, err
    assert parsed(out)[:2] == ["report", "int8"]


def test_a_plan_of_a_preset_leads_to_the_whole_recipe(run_unirank: Run, place: Path) -> None:
    calibrate = ["--calib", place / "text.txt", "--windows", 4, "--window", 24]
    code, out, err = run_unirank("analyze", "tiny", "-o", "store", "--preset", "fast", *calibrate)
    assert code == 0, err
    code, out, err = run_unirank(*parsed(out), "--multiple-of", 2)
    assert code == 0, err
    then = parsed(out)
    assert then[:4] == ["compress", "tiny", "-o", "store-compressed"]
    assert {"--remove", "--preset", "--multiple-of", "--calib"} <= set(then)
    code, out, err = run_unirank(*then, "--no-report")
    assert code == 0, err


def test_a_line_is_quoted_and_never_broken(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from unirank.cli.terminal import Session
    from unirank.progress import silent

    monkeypatch.setenv("COLUMNS", "40")
    session = Session(False, silent)
    session.show({}, endings.next_line("eval", Path("my models") / ("x" * 60), "--against", "it's [red]"))
    session.print()
    assert parsed(capsys.readouterr().out)[1:] == [f"my models/{'x' * 60}", "--against", "it's [red]"]


def test_sizes_are_told_with_their_change() -> None:
    sizes = {"mb_before": 200.0, "mb_after": 150.0}
    assert endings.sizes_line(sizes) == "On disk: 200.0 MB dense, 150.0 MB now, 25.0% less."
    assert endings.sizes_line(sizes, 0.3).startswith("Removed 30.00% of the decoder's linears. On disk")
    assert endings.sizes_line({"mb_before": 100.0, "mb_after": 150.0}, was="compressed").endswith("50.0% more.")


def test_what_comes_next_depends_on_what_was_found(small_checkpoint: Path) -> None:
    def told(against: str | None, ratio: float | None) -> list[str]:
        return shlex.split(endings.after_looking(str(small_checkpoint), against, ratio).plain)[2:]

    assert told("DENSE", 1.5)[0] == "heal"
    assert told("DENSE", 1.01)[0] == "quantize"
    assert told("DENSE", None) == ["eval", str(small_checkpoint), "--against", "DENSE"]
    assert shlex.split(endings.after_looking("hub/name", None, None).plain)[2:] == [
        *("compress", "hub/name", "--remove", "0.2", "-o", "name-compressed")
    ]


@pytest.fixture
def small_checkpoint(run_unirank: Run, place: Path) -> Path:
    calibrate = ["--calib", "text.txt", "--windows", 3, "--window", 24]
    code, _, err = run_unirank("compress", "tiny", "-r", 0.4, "-o", "small", *calibrate, "--no-report")
    assert code == 0, err
    return place / "small"
