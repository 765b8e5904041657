"""The command line as scripts see it: stdout, stderr, exit codes, files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.command_line import Run
from tests.support.tiny import build
from unirank import Calibration, Curve, RankPlan, UnirankError, presets
from unirank.cli.demo import demo
from unirank.cli.how_far import read_ladders
from unirank.cli.main import app
from unirank.errors import InputError

COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
REMOVE = "Fraction of the decoder linears' weight parameters to remove"


@pytest.fixture
def calibrate(text_file: Path) -> list[object]:
    """Options of a small calibration."""
    return ["--calib", text_file, "--windows", 6, "--window", 24, "--batch", 2, "--device", "cpu"]


@pytest.fixture
def store(run_unirank: Run, model_dir: Path, calibrate: list[object], tmp_path: Path) -> Path:
    code, _, err = run_unirank("analyze", model_dir, "-o", tmp_path / "store", *calibrate, "--json")
    assert code == 0, err
    return tmp_path / "store"


def one_object(out: str) -> dict[str, object]:
    """The one JSON object that is all of `out`."""
    record = json.loads(out)
    assert isinstance(record, dict)
    return record


def written(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_exits_0_and_defines_remove(command: str, run_unirank: Run) -> None:
    code, out, err = run_unirank(command, "--help")
    assert (code, err) == (0, "")
    assert (REMOVE in " ".join(re.sub(r"[│|]", " ", out).split())) == ("--remove" in out)
    assert ("--remove" in out) == (command in ("compress", "curve", "demo", "plan"))


def test_every_stage_speaks_json_and_compress_reuses_the_store(
    run_unirank: Run, store: Path, model_dir: Path, text_file: Path, calibrate: list[object], tmp_path: Path
) -> None:
    code, out, err = run_unirank("plan", store, "-r", "0.3", "--json", "-o", tmp_path / "plan.json")
    plan = RankPlan.from_json(out)
    assert (code, err) == (0, "")
    assert 0 < plan.used <= plan.budget
    assert RankPlan.from_json((tmp_path / "plan.json").read_text()) == plan

    before = written(store)
    small = tmp_path / "small"
    code, out, err = run_unirank(
        "compress", model_dir, "-r", "0.3", "-o", small, "--store", store, *calibrate, "--json"
    )
    assert (code, err) == (0, "")
    assert one_object(out)["used"] == plan.used
    assert written(store) == before
    assert RankPlan.from_json((small / "rank_plan.json").read_text()) == plan

    on = ["--text", text_file, "--window", 24, "--limit", 3, "--device", "cpu"]
    code, out, err = run_unirank("eval", small, "--against", model_dir, *on, "--prompt", "w1 w2", "--json")
    assert (code, err) == (0, "")
    dense, compressed = one_object(out)["rows"]
    assert (dense["model"], compressed["model"]) == (str(model_dir), str(small))
    assert dense["perplexity"] != compressed["perplexity"]
    assert dense["parameters"] - compressed["parameters"] == plan.total - plan.used
    assert all(row["sample"] for row in (dense, compressed))

    code, out, err = run_unirank("info", "--json")
    assert (code, err) == (0, "")
    assert {"versions", "device", "threads", "schemes", "allocators"} <= one_object(out).keys()


def test_allocator_options_by_name(run_unirank: Run, store: Path) -> None:
    plan = ["plan", store, "-r", "0.3", "--allocator", "typed", "--json"]
    plans = [RankPlan.from_json(run_unirank(*plan, *more)[1]) for more in ((), ("--set", "ratio=1"))]
    assert [p.settings["ratio"] for p in plans] == [3, 1]
    assert plans[0].ranks != plans[1].ranks
    for more, words in (
        (["--set", "beta=1"], "typed has no option 'beta'; it takes ratio"),
        (["--set", "ratio"], "NAME=NUMBER"),
        (["--set", "ratio=x"], "NAME=NUMBER"),
        (["--set", "ratio=1", "--set", "ratio=2"], "ratio twice"),
    ):
        code, out, err = run_unirank(*plan, *more)
        assert (code, out) == (2, "")
        assert words in err


def test_ranks_from_a_file_in_the_place_of_remove(
    run_unirank: Run, store: Path, model_dir: Path, calibrate: list[object], tmp_path: Path
) -> None:
    own, bare = tmp_path / "own.json", tmp_path / "bare.json"
    plan = RankPlan.from_json(run_unirank("plan", store, "-r", "0.3", "-o", own, "--json")[1])
    bare.write_text(json.dumps({"ranks": plan.ranks}))
    assert RankPlan.from_json(run_unirank("plan", store, "--ranks", own, "--json")[1]) == plan
    imported = RankPlan.from_json(run_unirank("plan", store, "--ranks", bare, "--json")[1])
    assert (imported.ranks, imported.used, imported.allocator) == (plan.ranks, plan.used, "imported")

    small = tmp_path / "small"
    code, out, err = run_unirank(
        "compress", model_dir, "--plan", bare, "-o", small, "--store", store, *calibrate, "--json"
    )
    assert (code, err) == (0, "")
    assert one_object(out)["used"] == plan.used
    assert RankPlan.from_json((small / "rank_plan.json").read_text()) == imported

    bare.write_text("{}")
    new = ["compress", model_dir, "-o", tmp_path / "new", "--device", "cpu"]
    for arguments, words in (
        (["plan", store, "--ranks", tmp_path / "none.json"], "cannot be read"),
        (["plan", store, "--ranks", bare], "missing linear"),
        ([*new, "--plan", bare], "missing linear"),
        (["plan", store], "exactly one"),
        (["plan", store, "-r", "0.3", "--ranks", own], "exactly one"),
        ([*new, "-r", "0.3", "--plan", own], "exactly one"),
        (["plan", store, "--ranks", own, "--min-rank", "2"], "--min-rank: it does not go with --ranks"),
        ([*new, "--plan", own, "--set", "ratio=1"], "--set: it does not go with --ranks"),
    ):
        code, out, err = run_unirank(*arguments)
        assert (code, out) == (2, ""), err
        assert words in " ".join(re.sub(r"[│|]", " ", err).split())
    assert not (tmp_path / "new-analysis").exists()


def test_tables_go_to_stdout(run_unirank: Run, store: Path, model_dir: Path, calibrate: list[object], tmp_path) -> None:
    for arguments, words in (
        (["plan", store, "-r", "0.3"], "budget"),
        (["analyze", model_dir, "-o", store, *calibrate], "cosine"),
        (["compress", model_dir, "-r", "0.3", "-o", tmp_path / "s", "--store", store, *calibrate], "import unirank"),
        (["eval", tmp_path / "s", "--text", calibrate[1], "--window", 24, "--device", "cpu"], "perplexity"),
        (["info"], "torch"),
    ):
        code, out, err = run_unirank(*arguments)
        assert (code, err) == (0, "")
        assert words in out


def test_gradients_and_damping_are_asked_for_and_shown(
    run_unirank: Run, model_dir: Path, calibrate: list[object], tmp_path: Path
) -> None:
    def analyze(name: str, *more: object) -> tuple[dict, str]:
        command = ["analyze", model_dir, "-o", tmp_path / name, *calibrate, *more]
        (code, out, err), (_, table, _) = run_unirank(*command, "--json"), run_unirank(*command)
        assert (code, err) == (0, "")
        return one_object(out), table

    record, table = analyze("plain")
    assert record["identity"]["calibration"]["gradient_windows"] == 0
    assert record["damping"] == {"matrices": 0, "largest": 0.0}
    assert "Damped" not in table
    record, table = analyze("asked", "--gradients", 2)
    assert record["identity"]["calibration"]["gradient_windows"] == 2
    record, table = analyze("kfac", "--scheme", "kfac")
    assert record["identity"]["calibration"]["gradient_windows"] == 6  # all: there are fewer than 32
    assert record["damping"] == {"matrices": 21, "largest": 1e-2}
    assert "Damped: 21 of 21 matrices, at most 0.01 of the mean" in table
    record, _ = analyze("fwsvd", "--scheme", "fwsvd", "--gradients-from", tmp_path / "asked")
    assert record["identity"]["calibration"]["gradient_windows"] == 2  # the store's, not the scheme's

    code, out, _ = run_unirank("plan", tmp_path / "asked", "-r", "0.3", "--allocator", "curvature", "--json")
    assert code == 0
    assert one_object(out)["allocator"] == "curvature"


def test_an_allocator_that_needs_gradients_gets_them_or_is_refused_before_calibration(
    run_unirank: Run, model_dir: Path, store: Path, calibrate: list[object], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("unirank.analysis.fill_store.record", lambda *_, **__: pytest.fail("calibration began"))
    compress = ["compress", model_dir, "-r", "0.3", "-o", tmp_path / "out", "--allocator", "curvature"]
    code, out, err = run_unirank(*compress, *calibrate, "--gradients", 0)
    assert (code, out) == (2, "")
    assert "curvature needs gradients" in err
    assert "--gradients" in err
    code, out, err = run_unirank(
        *compress, *calibrate, "--store", store
    )  # a finished store without gradients stays as it is
    assert (code, out) == (3, "")
    assert "gradient_windows (store: 0, now: 6)" in err
    code, _, err = run_unirank(*compress, *calibrate, "--gradients", 7)
    assert code == 2
    assert "--gradients = 7 is not legal" in err
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for asked, made in ((("--gradients", 2), 2), ((), 6)):
        code, out, err = run_unirank(*compress, *calibrate, *asked, "--overwrite", "--json")
        assert (code, err) == (0, "")
        analysis = one_object((Path(one_object(out)["store"]) / "analysis.json").read_text())
        assert analysis["identity"]["calibration"]["gradient_windows"] == made


def test_a_preset_is_a_recipe_and_goes_with_no_other(
    run_unirank: Run, model_dir: Path, calibrate: list[object], tmp_path: Path
) -> None:
    compress = ["compress", model_dir, "-r", "0.3", *calibrate]
    for preset in presets():
        code, _, err = run_unirank(*compress, "-o", tmp_path / preset, "--preset", preset)
        assert (code, err) == (0, "")
        plan = RankPlan.from_json((tmp_path / preset / "rank_plan.json").read_text())
        assert plan.used <= plan.budget
        assert ("refine" in plan.settings) == (preset != "unirank")
    code, _, err = run_unirank(*compress, "-o", tmp_path / "mixed", "--preset", "fast", "--scheme", "svd")
    assert code == 2
    assert "--scheme" in err
    code, _, err = run_unirank(*compress, "-o", tmp_path / "unknown", "--preset", "magic")
    assert code == 2
    assert "legal values: unirank, fast, best" in err
    code, _, err = run_unirank(*compress, "-o", tmp_path / "refined", "--refine", "0.5")
    assert (code, err) == (0, "")


def test_each_kind_of_failure_has_its_exit_code_and_one_sentence_on_stderr(
    run_unirank: Run, store: Path, text_file: Path, tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = build("llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")

    def fail() -> None:
        raise UnirankError("the plan and the modules differ")

    monkeypatch.setattr("unirank.cli.info.build_info", fail)
    (tmp_path / "file").touch()
    for code, words, arguments in (
        (1, "modules differ", ["info"]),
        (2, "remove = 1.5", ["plan", store, "-r", "1.5"]),
        (3, "not an analysis store", ["plan", tmp_path / "none", "-r", "0.2"]),
        (4, "window 0", ["eval", tmp_path / "broken", "--text", text_file, "--window", 24, "--device", "cpu"]),
        (5, "Could not write", ["plan", store, "-r", "0.2", "-o", tmp_path / "no" / "plan.json"]),
        (5, "Could not write", ["plan", store, "-r", "0.2", "-o", tmp_path / "file" / "plan.json"]),
        (5, "Could not write", ["plan", store, "-r", "0.2", "-o", store]),
    ):
        got, out, err = run_unirank(*arguments, "--json")
        assert (got, out) == (code, ""), err
        assert words in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", "store"], ["plan", "store", "-r", "x"], ["info", "--no-such"], ["no-such"]]
)
def test_wrong_usage_exits_2_and_shows_it_on_stderr(arguments: list[str], run_unirank: Run) -> None:
    code, out, err = run_unirank(*arguments)
    assert (code, out) == (2, "")
    assert re.match(r"Usage: .*unirank", err)  # typer writes how it was started in front


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def interrupted_while_loading(*_: object, **__: object) -> None:
    """As when Ctrl-C comes inside `__enter__` of a torch mode: `__exit__` then fails, and loading reports that."""
    try:
        try:
            interrupted()
        finally:
            raise IndexError("trying to pop from empty mode stack")
    except IndexError as error:
        raise InputError(f"Cannot load the weights of 'model': {error}.") from error


@pytest.mark.parametrize("how", [interrupted, interrupted_while_loading])
def test_ctrl_c_exits_130_and_says_that_work_is_kept(
    how: Callable[..., None], run_unirank: Run, model_dir: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("unirank.models.loading.load", how)
    code, out, err = run_unirank("analyze", model_dir, "-o", tmp_path / "store", "--device", "cpu")
    assert (code, out) == (130, "")
    assert "resumes" in err
    assert "Traceback" not in err


def test_the_demo_writes_comparable_rows_and_resumes(model_dir: Path, text_file: Path, tmp_path, monkeypatch) -> None:
    calibration = Calibration(text=str(text_file), windows=4, window=16, batch=2)

    def run():
        options = {"remove": (0.3,), "model": str(model_dir), "calibration": calibration, "limit": 1, "device": "cpu"}
        return demo(tmp_path / "demo", **options)

    first = run()
    record = json.loads((tmp_path / "demo" / "demo.json").read_text())
    columns = {"model", "scheme", "allocator", "remove", "text", "perplexity", "used", "budget", "seconds"}
    assert [(row["preset"], row["allocator"], row["remove"]) for row in record["rows"]] == [
        ("", "dense", 0.0),
        ("", "uniform", 0.3),
        ("unirank", "unirank", 0.3),
        ("fast", "lems", 0.3),
    ]
    curve = Curve.from_json((tmp_path / "demo" / "curve.json").read_text())
    assert [point.evaluations[0].perplexity for point in (curve.dense, *curve.points)] == [
        row["perplexity"] for row in record["rows"]
    ]
    assert all(page.is_file() for page in first.pages)
    assert all(columns <= row.keys() and row["used"] <= row["budget"] for row in record["rows"])
    assert {"versions", "device", "threads"} <= record["meta"].keys()
    (checkpoint,) = first.checkpoints
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert sum(parameter.numel() for parameter in model.parameters()) == first.rows[-1].parameters

    stores = [tmp_path / "demo" / f"analysis-{scheme}" for scheme in ("whiten", "afm")]
    before = [written(store) for store in stores]
    monkeypatch.setattr("unirank.analysis.fill_store.record", lambda *_, **__: pytest.fail("calibrated again"))
    second = run()
    assert [written(store) for store in stores] == before
    assert [row.perplexity for row in second.rows] == [row.perplexity for row in first.rows]


def test_a_finished_store_is_taken_as_it_is_unless_calibration_is_asked_for(
    run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    options = ["--calib", text_file, "--windows", 4, "--window", 24]
    assert run_unirank("analyze", model_dir, "-o", store, *options)[0] == 0
    before = (store / "analysis.json").read_bytes()
    common = ["compress", model_dir, "--remove", 0.3, "-o", out, "--store", store]
    assert run_unirank(*common)[0] == 0
    # Other calibration, even with --overwrite, must not replace a store that the user named.
    code, _, err = run_unirank(*common, "--overwrite", "--windows", 5)
    assert code == 3
    assert "calibration.windows (store: 4, now: 5)" in err
    assert (store / "analysis.json").read_bytes() == before


def test_fractions_may_be_percentages(run_unirank: Run, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    calibrate = ["--calib", text_file, "--windows", 4, "--window", 24, "--device", "cpu"]
    assert run_unirank("analyze", model_dir, "-o", store, *calibrate)[0] == 0
    plans = [run_unirank("plan", store, "--remove", given, "--json") for given in ("0.2", "20%", "20 %", "2e-1")]
    assert plans[0][0] == 0
    assert all(plan == plans[0] for plan in plans)
    for given in ("20%%", "a fifth", "%"):
        code, _, err = run_unirank("plan", store, "--remove", given)
        assert code == 2
        assert "it is a fraction such as 0.2, or 20%" in " ".join(re.sub("[│|]", " ", err).split())
    assert read_ladders(["10%", "fast=20%,0.4"], ["unirank", "fast"]) == {"unirank": [0.1], "fast": [0.2, 0.4]}
