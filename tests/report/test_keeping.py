"""What `eval` measures reaches the checkpoint's record and its page by itself, and never harms either."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unirank
from tests.support.command_line import Run
from tests.support.measured import a_curve
from tests.support.tiny import build
from unirank.compression.card import EVALUATIONS_FILE, PROVENANCE_FILE
from unirank.compression.checkpoint import check_weights, read_record
from unirank.evaluation import side_by_side
from unirank.evaluation.side_by_side import PROMPT, measure
from unirank.report.keeping import refresh_page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_file: Path) -> Path:
    """A dense model, and what `compress` makes of it: OUT, OUT-analysis and OUT.html."""
    folder = tmp_path_factory.mktemp("made")
    build("llama").save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return folder


@pytest.fixture
def work(made: Path, text_file: Path, tmp_path: Path, run_unirank: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to change, in the working directory."""
    monkeypatch.chdir(tmp_path)
    if not (made / "OUT").is_dir():
        calibrate = ["--calib", text_file, "--windows", 6, "--window", 24, "--device", "cpu"]
        code, out, err = run_unirank("compress", made / "dense", "-r", "0.4", "-o", made / "OUT", *calibrate, "--json")
        assert (code, err) == (0, "")
        record = json.loads(out)
        assert (record["page"], record["notes"]) == (str(made / "OUT.html"), [])
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def on(text_file: Path) -> list[object]:
    return ["--text", text_file, "--window", 24, "--limit", 2, "--device", "cpu"]


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != EVALUATIONS_FILE}


def test_compress_writes_the_page_by_itself_and_eval_completes_it(
    run_unirank: Run, work: Path, on: list[object]
) -> None:
    page = work / "OUT.html"
    assert "This command measures them" in page.read_text()
    before = files(work / "OUT")
    code, out, err = run_unirank("eval", "OUT", "--against", "dense", *on, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    dense, small = found["rows"]
    assert (found["recorded"], found["page"], found["notes"]) == (True, "OUT.html", [])
    assert {"prefill", "decode"} <= small["speed"].keys()
    assert files(work / "OUT") == before
    record = read_record(work / "OUT")
    check_weights(work / "OUT", record)
    (one,) = record.evaluations
    assert one["report"]["perplexity"] == small["perplexity"]
    assert one["dense"] == dense["perplexity"]
    assert one["speed"] == {"dense": dense["speed"], "model": small["speed"]}
    assert one["sample"] == {"prompt": PROMPT, "dense": dense["sample"], "model": small["sample"]}
    text = page.read_text()
    assert "This command measures" not in text
    assert f"{small['perplexity'] / dense['perplexity']:.2f} times the dense one" in text
    assert "Spectra" in text  # its store is still in it
    assert unirank.open_compressed(work / "OUT", device="cpu").evaluations == record.evaluations


def test_no_record_leaves_everything_as_it_is(run_unirank: Run, work: Path, on: list[object]) -> None:
    before = (files(work / "OUT"), (work / "OUT.html").read_bytes())
    code, out, err = run_unirank("eval", "OUT", "--against", "dense", *on, "--no-record", "--no-speed", "--json")
    assert (code, err) == (0, "")
    assert "recorded" not in json.loads(out)
    assert "speed" not in json.loads(out)["rows"][0]
    assert (files(work / "OUT"), (work / "OUT.html").read_bytes()) == before
    assert not (work / "OUT" / EVALUATIONS_FILE).exists()
    code, _, err = run_unirank("eval", "OUT", *on, "--no-record", "--card")
    assert code == 2
    assert "--card is of what is recorded; leave out --no-record." in err


def test_another_model_than_the_dense_one_is_not_recorded_as_it(run_unirank: Run, work: Path, on: list[object]) -> None:
    """TUNED against OUT, or the 8 bits of OUT against it."""
    shutil.copytree(work / "OUT", work / "TUNED")
    code, out, err = run_unirank("eval", "TUNED", "--against", "OUT", *on, "--no-speed", "--json")
    assert (code, err) == (0, "")
    (note,) = json.loads(out)["notes"]
    assert note.startswith("Of the two, only the perplexity of TUNED is recorded: the other model has ")
    (one,) = read_record(work / "TUNED").evaluations
    assert one["dense"] is None
    assert not {"speed", "sample"} & one.keys()


def test_a_dense_model_is_evaluated_and_nothing_is_written(run_unirank: Run, work: Path, on: list[object]) -> None:
    before = files(work / "dense")
    code, out, err = run_unirank("eval", "dense", *on, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["recorded"] is False
    assert "speed" not in json.loads(out)["rows"][0]
    assert files(work / "dense") == before
    code, out, err = run_unirank("eval", "dense", *on, "--speed", "--no-record", "--json")
    assert "speed" in json.loads(out)["rows"][0]


def test_what_cannot_be_written_is_a_note(
    run_unirank: Run, work: Path, on: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, record: object) -> None:
        raise unirank.WriteError(f"Could not write {path}: the file system is read-only.")

    with monkeypatch.context() as patch:
        patch.setattr("unirank.compression.checkpoint.write_json", refuse)
        code, out, err = run_unirank("eval", "OUT", *on)
        assert (code, err) == (0, "")
        assert "Not recorded in OUT: Could not write OUT/evaluations.json" in " ".join(out.split())
        assert run_unirank("eval", "OUT", *on, "--card")[0] == 5  # who asks for it is told by an error
    weights = work / "OUT" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # the last bit of a float
    weights.write_bytes(content)
    code, out, err = run_unirank("eval", "OUT", *on, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["recorded"] is False
    assert "has other bytes than were written" in json.loads(out)["notes"][0]


def test_pages_that_would_lose_something_stay(run_unirank: Run, work: Path) -> None:
    def note() -> str:
        kept = refresh_page(Path("OUT"))
        assert kept.page is None
        return " ".join(kept.notes)

    page = work / "OUT.html"
    page.write_text("<title>mine</title>")
    assert note() == "OUT.html stays as it is: unirank did not write it."
    assert page.read_text() == "<title>mine</title>"
    side = ["--against", "dense", "--prompt", "w1 w2", "--device", "cpu", "--overwrite"]
    assert run_unirank("report", "OUT", *side)[0] == 0
    assert "has texts side by side and stays as it is; write it again with: unirank report OUT" in note()
    assert run_unirank("report", "OUT", "--overwrite")[0] == 0
    assert refresh_page(Path("OUT")).page == Path("OUT.html")
    shutil.move(work / "OUT-analysis", work / "elsewhere")
    assert "its store OUT-analysis is gone" in note()
    page.unlink()
    assert note() == ""
    assert not page.exists()


def test_compress_replaces_only_pages_of_its_own(run_unirank: Run, work: Path) -> None:
    shutil.rmtree(work / "OUT")
    small = ["compress", "dense", "-r", "0.3", "-o", "OUT", "--device", "cpu"]
    before = (work / "OUT.html").read_text()
    assert run_unirank(*small, "--json")[::2] == (0, "")  # the page of the OUT that is gone
    assert (work / "OUT.html").read_text() != before
    shutil.rmtree(work / "OUT")
    (work / "OUT.html").write_text("mine")
    code, _, err = run_unirank(*small)
    assert code == 2
    assert "The page OUT.html exists already" in err
    code, out, err = run_unirank(*small, "--no-report", "--json")
    assert (code, err) == (0, "")
    assert "page" not in json.loads(out)
    assert (work / "OUT.html").read_text() == "mine"


def test_a_curve_beside_the_checkpoint_is_on_its_page(run_unirank: Run, work: Path) -> None:
    dense = replace(a_curve().dense, parameters=read_record(work / "OUT").report.model_before)
    (work / "OUT-curve").mkdir()
    (work / "OUT-curve" / "curve.json").write_text(replace(a_curve(), dense=dense).to_json())
    assert run_unirank("report", "OUT", "--overwrite")[0] == 0
    assert "How far one can go" in (work / "OUT.html").read_text()
    shutil.move(work / "OUT-curve", work / "other")
    assert run_unirank("report", "OUT", "-o", "page.html", "--curve", "other/curve.json")[0] == 0
    assert "How far one can go" in (work / "page.html").read_text()
    assert run_unirank("report", "OUT", "--overwrite")[0] == 0
    assert "How far one can go" not in (work / "OUT.html").read_text()


def test_checkpoints_that_another_tool_saved_are_recorded_too(run_unirank: Run, work: Path, on: list[object]) -> None:
    (work / "OUT" / "rank_plan.json").unlink()
    (work / "OUT" / PROVENANCE_FILE).unlink()
    (work / "OUT.html").unlink()
    code, out, err = run_unirank("eval", "OUT", "--against", "dense", *on, "--no-speed", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["recorded"] is True
    assert read_record(work / "OUT").evaluations[0]["dense"] is not None


def test_what_nobody_asked_for_and_cannot_be_had_is_a_note(
    made: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("no cache here")

    monkeypatch.setattr(side_by_side, "generate", broken)
    monkeypatch.setattr(side_by_side, "tokens_per_second", broken)
    asked: dict[str, Any] = {"text": str(text_file), "window": 24, "limit": 2, "loading": {"device": "cpu"}}
    two = [str(made / "dense")] * 2
    found = measure(two, **asked)
    assert (found.samples, found.prompt, found.speeds, len(found.reports)) == (None, None, None, 2)
    told = "the model cannot generate: AttributeError: no cache here."
    assert found.notes == (f"No text was generated: {told}", f"Tokens a second were not measured: {told}")
    with pytest.raises(AttributeError):
        measure(two, **asked, prompt="w1")
    with pytest.raises(AttributeError):
        measure(two, **asked, speed=True)
    assert measure(two, **asked, speed=False).notes == (f"No text was generated: {told}",)
