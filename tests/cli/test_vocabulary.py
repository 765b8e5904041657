"""One word for one thing: what the library offers the command line offers, under one name; old spellings still work."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

import unirank
from tests.support.command_line import Run
from unirank.cli import options
from unirank.cli.main import _OLD, app
from unirank.cli.terminal import in_flags
from unirank.models.embedded import NAME
from unirank.text import records, windows

COMMANDS = {command.name: command.callback for command in app.registered_commands}
# An argument of the library whose option has another name, or none because a directory on the disk takes its place.
NAMES = {
    "options": "set_",
    "calibration": "calib",
    "revision": "model_revision",
    "store": "store",
    "text": "calib",
    "gradient_windows": "gradients",
    "shares": "calib_shares",
    "mix": "refine",
}
# Objects in memory, which a command line cannot name; what a command does by itself.
IN_MEMORY = {"tokenizer", "settings", "workbench", "progress", "copy", "hidden_limit", "windows", "loaded", "pages"}


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["analyze", "plan", "compress"])
def test_the_command_has_every_argument_of_the_function(name: str) -> None:
    own = parameters(getattr(unirank, name)) - IN_MEMORY
    if name == "analyze":
        own -= {"store"}  # its --out
    own -= {"target"}  # an option for each of its fields, see below
    flags = parameters(COMMANDS[name]) | {"out"}
    for argument in own:
        assert NAMES.get(argument, argument) in flags, argument
    assert {field.name for field in dataclasses.fields(unirank.ScoreSettings)} <= flags or name == "analyze"


def test_every_field_of_the_settings_is_an_option() -> None:
    calibration = {NAMES.get(field.name, field.name) for field in dataclasses.fields(unirank.Calibration)}
    calibration = calibration - {"model_revision"} | {"text_revision"}
    assert calibration <= parameters(COMMANDS["analyze"])
    assert calibration <= parameters(COMMANDS["compress"])
    refine = {field.name for field in dataclasses.fields(unirank.Refine)} - {"mix"}
    assert {"refine", *(f"refine_{name}" for name in refine)} <= parameters(COMMANDS["compress"])
    target = {field.name for field in dataclasses.fields(unirank.Target)}
    measured = {"window": "text_window", "limit": "text_limit"}
    for command in ("compress", "auto"):
        assert {measured.get(name, name) for name in target} <= parameters(COMMANDS[command])
    assert {field.name for field in dataclasses.fields(unirank.Finetune)} <= parameters(COMMANDS["finetune"])
    assert {field.name for field in dataclasses.fields(unirank.Heal)} <= parameters(COMMANDS["heal"])


def test_the_dense_model_and_texts_have_one_name_each() -> None:
    for name, command in COMMANDS.items():
        own = parameters(command)
        assert not own & {"dense", "teacher", "data", "plan"}, name
        assert ("calib" in own) == (name in ("analyze", "plan", "compress", "auto", "curve", "heal", "diagnose"))
        assert ("against" in own) == (name in ("plan", "curve", "eval", "heal", "finetune", "report", "diagnose"))
        assert ("text" in own) == (name in ("compress", "auto", "curve", "eval", "heal", "finetune"))


def test_whatever_loads_a_model_can_be_told_to_trust_its_code() -> None:
    for name, command in COMMANDS.items():
        own = parameters(command)
        assert ("trust_remote_code" in own) == ("device" in own and name != "demo"), name  # the demo's model is our own
    for name in unirank.__all__:
        found = getattr(unirank, name)
        if inspect.isfunction(found) and "device" in parameters(found):
            assert inspect.signature(found).parameters["trust_remote_code"].default is False, name


def test_names_that_help_shows_are_the_librarys() -> None:
    assert (options.BUILTIN, options.BUILTIN_HELD_OUT) == (windows.BUILTIN, windows.BUILTIN_HELD_OUT)
    assert options.EMBEDDED == NAME
    assert tuple(records.NAMED) == options.NAMED


def test_units_and_sentences_of_the_targets_keep_their_capitals() -> None:
    for name in ("compress", "auto"):
        for wanted, given in (("params", "100M"), ("size", "200MB"), ("max_perplexity_increase", "10%. Found")):
            option = inspect.get_annotations(COMMANDS[name], eval_str=True)[wanted].__metadata__[0]
            assert given in option.help, (name, wanted)


def test_old_spellings_work_and_stand_in_no_help(
    run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    for name, old in _OLD.items():
        shown = set(re.findall(r"--[a-z-]+", run_unirank(name, "--help")[1]))
        assert set(old.values()) <= shown
        assert not set(old) & shown, name
    calibrate = ["--calib", text_file, "--windows", 4, "--window", 24, "--device", "cpu"]
    store, ranks = tmp_path / "store", tmp_path / "ranks.json"
    assert run_unirank("analyze", model_dir, "-o", store, *calibrate)[0] == 0
    asked = ["plan", store, "-r", "0.3", "--allocator", "lems", "--set", "windows=1", "--set", "tokens=8", "--json"]
    one, other = (
        run_unirank(*asked, flag, model_dir, "--calib", text_file, "--device", "cpu", "-o", ranks)
        for flag in ("--model", "--against")
    )
    assert one == other
    assert one[0] == 0
    code, _, err = run_unirank("compress", model_dir, f"--plan={ranks}", "-o", tmp_path / "out", "--store", store)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "rank_plan.json").read_text())["ranks"] == json.loads(one[1])["ranks"]


def test_help_has_groups_and_the_common_options_come_first(run_unirank: Run) -> None:
    code, out, _ = run_unirank("compress", "-h")
    assert code == 0
    groups = re.findall(r"╭─ ([A-Z][a-z]+)", out)
    assert groups == ["Arguments", "Options", "Calibration", "Recipe", "Ranks", "Model", "Output"]
    first = out.split("Calibration ─")[0]
    assert set(re.findall(r"--[a-z-]+", first)) >= {"--out", "--remove", "--ranks", "--preset", "--calib"}
    assert "--windows" not in first


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("needs the dense model; give it with against=.", "give it with --against."),
        ("pass overwrite=True to replace it.", "pass --overwrite to replace it."),
        ("Calibration.gradient_windows must be at least 1", "--gradients must be at least 1"),
        ("a shorter Calibration.window", "a shorter --window"),
        ("Finetune.window = 100 is not legal", "--window = 100 is not legal"),
        (
            "Exactly one of remove=, ranks= and target= is needed; remove= and ranks= was given.",
            "--remove, --ranks and --target is needed",
        ),
        ("a lower Heal.lr may help", "a lower --lr may help"),
        ("remove = 1.5 is not legal", "remove = 1.5 is not legal"),
        ("sha256=abc is", "sha256=abc is"),
    ],
)
def test_arguments_of_a_message_become_options(said: str, shown: str) -> None:
    assert shown in in_flags(said)


def test_presets_work_wherever_a_scheme_and_an_allocator_do(
    run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    calibrate = ["--calib", text_file, "--windows", 4, "--window", 24, "--device", "cpu"]
    for preset, scheme in (("unirank", "whiten"), ("fast", "afm"), ("best", "kfac")):
        store = tmp_path / preset
        code, out, err = run_unirank("analyze", model_dir, "-o", store, "--preset", preset, *calibrate, "--json")
        assert (code, err) == (0, "")
        identity = json.loads(out)["identity"]
        assert identity["scheme"] == scheme
        assert bool(identity["calibration"]["gradient_windows"]) == (preset == "best")
        measuring = ["--against", model_dir, "--calib", text_file, "--device", "cpu"]
        code, out, err = run_unirank("plan", store, "-r", "0.3", "--preset", preset, *measuring, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["allocator"] == ("unirank" if preset == "unirank" else "lems")
        small = ["compress", model_dir, "-r", "0.3", "-o", tmp_path / f"{preset}-small", "--store", store]
        # The text alone: windows and their length are the store's.
        code, _, err = run_unirank(*small, "--preset", preset, "--calib", text_file, "--device", "cpu")
        assert (code, err) == (0, "")
    for preset, store, lacks in (("fast", "unirank", "scheme whiten, and afm is needed"), ("best", "fast", "kfac")):
        for command in (["plan"], ["compress", model_dir, "-o", tmp_path / "no"]):
            place = [tmp_path / store] if command == ["plan"] else ["--store", tmp_path / store]
            code, out, err = run_unirank(*command, *place, "-r", "0.3", "--preset", preset)
            assert (code, out) == (3, "")
            assert lacks in err
            assert f"unirank analyze MODEL -o NEW-STORE --scheme {'afm' if preset == 'fast' else 'kfac'}" in err
    assert not (tmp_path / "no").exists()


def test_a_command_that_is_typed_wrong_names_the_option(run_unirank: Run, model_dir: Path, tmp_path: Path) -> None:
    code, _, err = run_unirank("compress", model_dir, "-o", tmp_path / "x", "-r", "0.2", "--refine-metric")
    assert code == 2
    assert "--refine-metric needs --refine MIX" in err


def test_what_comes_next_keeps_what_was_chosen(
    run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    calibrate = ["--calib", text_file, "--windows", 4, "--window", 24, "--device", "cpu"]
    code, out, _ = run_unirank("analyze", model_dir, "-o", tmp_path / "store", "--preset", "fast", *calibrate)
    assert code == 0
    following = out.partition("Next: unirank ")[2].split()  # the last line, which may be broken
    code, out, err = run_unirank(*following, "--device", "cpu", "-o", tmp_path / "plan.json")
    assert (code, err) == (0, "")
    second = " ".join(out.split()).partition("give compress ")[2].partition(" too.")[0].split()
    whole = ["compress", model_dir, "--store", tmp_path / "store", "--calib", text_file, "--device", "cpu"]
    assert run_unirank(*whole, "--ranks", tmp_path / "plan.json", *second, "-o", tmp_path / "a")[0] == 0
    assert run_unirank(*whole, "-r", "0.2", "--preset", "fast", "-o", tmp_path / "b")[0] == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_a_page_is_not_replaced_in_passing(run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    calibrate = ["--calib", text_file, "--windows", 4, "--window", 24, "--device", "cpu"]
    small = ["compress", model_dir, "-r", "0.3", "-o", tmp_path / "out", *calibrate, "--report"]
    assert run_unirank(*small)[0] == 0
    page = tmp_path / "out.html"
    before = page.read_bytes()
    assert b"cosine" in before  # the store is in it
    code, _, err = run_unirank("report", tmp_path / "out")
    assert code == 2
    assert f"The page {page} exists already; pass --overwrite" in err
    assert page.read_bytes() == before
    assert run_unirank("report", tmp_path / "out", "--overwrite")[0] == 0
