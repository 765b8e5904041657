"""Calibration from several texts: windows of each, an identity that names all, and windows that are found again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.command_line import Run
from tests.support.stores import contents
from tests.support.tiny import WORDS, made_up_identity
from unirank.analysis.calibration import texts_of, windows_of
from unirank.analysis.identity import Identity
from unirank.analysis.manifest import MANIFEST
from unirank.analysis.needs import dry_run
from unirank.analysis.redraw import is_text_of, redrawn_windows, text_to_redraw
from unirank.analysis.store import open_store
from unirank.disk.hashing import sha256_text
from unirank.disk.strictjson import Damaged
from unirank.types import LoadedModel

HALF = len(WORDS) // 2


def write_words(path: Path, words: list[str], count: int, seed: int) -> Path:
    order = torch.randint(0, len(words), (count,), generator=torch.Generator().manual_seed(seed))
    path.write_text(" ".join(words[i] for i in order.tolist()))
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """Words of the first half of the vocabulary."""
    return write_words(tmp_path / "first.txt", WORDS[2:HALF], 900, 1)


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Words of the second half."""
    return write_words(tmp_path / "second.txt", WORDS[HALF:], 500, 2)


@pytest.fixture
def both(first: Path, second: Path) -> unirank.Calibration:
    """6 windows of 24 tokens from the first, 2 from the second."""
    return unirank.Calibration(f"{first},{second}", windows=8, window=24, batch=2, shares=[3, 1])


def drawn(loaded: LoadedModel, calibration: unirank.Calibration) -> torch.Tensor:
    return windows_of(loaded, texts_of(loaded, calibration), calibration)


def of_second(windows: torch.Tensor) -> list[bool]:
    """Which windows hold words of the second text; none holds words of both."""
    upper = windows >= HALF
    assert (upper.all(1) | ~upper.any(1)).all()
    return upper.all(1).tolist()


# -- windows ----------------------------------------------------------------------------------------------------------


def test_each_text_gives_its_share_as_if_it_were_alone(make_model, both, first: Path, second: Path) -> None:
    loaded = make_model()
    windows = drawn(loaded, both)
    which = torch.tensor(of_second(windows))
    assert which.tolist() == [False, False, True, False] * 2
    for path, chosen, count in ((first, ~which, 6), (second, which, 2)):
        alone = dataclasses.replace(both, text=str(path), windows=count, shares=None)
        assert windows[chosen].equal(drawn(loaded, alone))


def test_shares_are_equal_where_nothing_is_said(make_model, both) -> None:
    windows = drawn(make_model(), dataclasses.replace(both, shares=None))
    assert of_second(windows) == [False, True] * 4


def test_a_sequence_is_the_same_as_commas(first: Path, second: Path) -> None:
    joined = unirank.Calibration(f"{first},{second}")
    for given in ([str(first), str(second)], (first, second)):
        assert unirank.Calibration(given) == joined  # pyright: ignore[reportArgumentType] - documented
    assert unirank.Calibration([first]) == unirank.Calibration(str(first))  # pyright: ignore[reportArgumentType]


def test_a_text_whose_name_has_a_comma_is_one_text(make_model, first: Path, tmp_path: Path) -> None:
    odd = tmp_path / "first,second.txt"
    odd.write_text(first.read_text())
    loaded = make_model()
    plain = unirank.Calibration(str(first), windows=4, window=24, batch=2)
    named = dataclasses.replace(plain, text=str(odd))
    assert drawn(loaded, named).equal(drawn(loaded, plain))
    store = unirank.analyze(loaded, tmp_path / "store", calibration=named)
    assert (store.identity.calibration.text, store.identity.calibration.texts) == (odd.name, None)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[0, 1], [-1, 2], [float("nan"), 1], [float("inf"), 1], "31", 3, [], ["3", "1"]])
def test_shares_that_are_not_legal_are_named(shares: Any, first: Path, second: Path) -> None:
    with pytest.raises(unirank.InputError, match=r"Calibration\.shares = .* is not legal; "):
        unirank.Calibration(f"{first},{second}", shares=shares)


@pytest.mark.parametrize("text", [[], 3, [3], None])
def test_texts_that_are_not_legal_are_named(text: Any) -> None:
    with pytest.raises(unirank.InputError, match=r"Calibration\.text = .* is not legal"):
        unirank.Calibration(text)


def test_a_comma_in_a_name_among_several_is_an_error(first: Path) -> None:
    with pytest.raises(unirank.InputError, match=r"Calibration\.text has 'a,b\.txt'; among several texts none has a"):
        unirank.Calibration([str(first), "a,b.txt"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shares", [[1], [1, 1, 1]])
def test_shares_are_one_a_text(shares: list[float], make_model, both, tmp_path: Path) -> None:
    wrong = dataclasses.replace(both, shares=shares)
    with pytest.raises(unirank.InputError, match=r"there must be one for each text, and '.*' is 2\."):
        unirank.analyze(make_model(), tmp_path / "store", calibration=wrong)
    assert not (tmp_path / "store").exists()


def test_a_missing_second_file_is_an_error_before_anything_is_written(make_model, first: Path, tmp_path: Path) -> None:
    wrong = unirank.Calibration(f"{first},{tmp_path / 'missing.txt'}", windows=8, window=24)
    with pytest.raises(unirank.InputError, match=r"The text '[^']*missing\.txt' is not a file"):
        unirank.analyze(make_model(), tmp_path / "store", calibration=wrong)
    assert not (tmp_path / "store").exists()


def test_one_content_under_two_names_is_an_error(make_model, first: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(first.read_text())
    wrong = unirank.Calibration(f"{first},{copy}", windows=8, window=24)
    with pytest.raises(unirank.InputError, match=r"first\.txt and .*copy\.txt have the same content; give it once"):
        unirank.analyze(make_model(), tmp_path / "store", calibration=wrong)


def test_a_share_that_gives_no_window_is_an_error(make_model, both) -> None:
    with pytest.raises(unirank.InputError, match=r"The text second\.txt would give none of 8 windows"):
        drawn(make_model(), dataclasses.replace(both, shares=[100, 1]))


def test_a_split_is_of_every_text(make_model, both) -> None:
    with pytest.raises(unirank.InputError, match=r"first\.txt' is no dataset, so it has no split"):
        drawn(make_model(), dataclasses.replace(both, split="train"))


# -- kinds of text ----------------------------------------------------------------------------------------------------


def test_conversations_and_datasets_are_texts_too(make_model, first: Path, tmp_path: Path) -> None:
    loaded = make_model()
    core = loaded.tokenizer.backend_tokenizer
    chat = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    chat.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    loaded = dataclasses.replace(loaded, tokenizer=chat)
    talk = tmp_path / "talk.jsonl"
    words = (WORDS[HALF:] * 8)[:160]
    record = {"messages": [{"role": "user", "content": " ".join(words)}]}
    talk.write_text(json.dumps(record) + "\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = {"text": [" ".join(WORDS[2:HALF]) for _ in range(4)]}
    datasets.Dataset.from_dict(lines).to_parquet(str(folder / "train.parquet"))
    calibration = unirank.Calibration(f"{first},{talk},{folder}", windows=6, window=24, batch=2)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    texts = store.identity.calibration.texts
    assert texts is not None
    assert [text.name for text in texts] == ["first.txt", "talk.jsonl", str(folder)]
    windows = redrawn_windows(loaded, store, text=calibration.text)
    assert of_second(windows) == [False, True, False] * 2


# -- the identity -----------------------------------------------------------------------------------------------------


def test_the_identity_has_each_text(make_model, both, first: Path, second: Path, tmp_path: Path) -> None:
    store = unirank.analyze(make_model(), tmp_path / "store", calibration=both)
    recorded = json.loads((store.path / MANIFEST).read_text())["identity"]["calibration"]
    assert recorded["text"] == "first.txt,second.txt"
    assert "text_sha256" not in recorded
    assert recorded["texts"] == [
        {"name": path.name, "sha256": sha256_text(path.read_text()), "windows": count}
        for path, count in ((first, 6), (second, 2))
    ]
    assert open_store(store.path).identity == store.identity
    assert open_store(store.path).digest == store.digest


def test_one_text_is_recorded_as_ever(make_model, first: Path, tmp_path: Path) -> None:
    calibration = unirank.Calibration(str(first), windows=4, window=24, batch=2, clip=0, shares=[5])
    store = unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)
    assert json.loads((store.path / MANIFEST).read_text())["identity"]["calibration"].keys() == {
        *("text", "text_sha256", "windows_sha256", "windows", "window", "seed", "batch", "gradient_windows")
    }


def test_it_resumes_and_other_shares_or_texts_are_refused(make_model, both, second: Path, tmp_path: Path) -> None:
    loaded = make_model()
    store = unirank.analyze(loaded, tmp_path / "store", calibration=both)
    whole = contents(store.path)
    store.layer_file(2).unlink()
    unirank.analyze(loaded, store.path, calibration=both)
    assert contents(store.path) == whole
    with pytest.raises(unirank.StoreError, match=r"calibration\.texts\.0\.windows \(store: 6, now: 4\)"):
        unirank.analyze(loaded, store.path, calibration=dataclasses.replace(both, shares=None))
    alone = dataclasses.replace(both, text=str(second), shares=None)
    with pytest.raises(unirank.StoreError, match=r"calibration\.text \(store: 'first\.txt,second\.txt', now: 'second"):
        unirank.analyze(loaded, store.path, calibration=alone)


PAIR = [{"name": "a", "sha256": "x", "windows": 1}, {"name": "b", "sha256": "y", "windows": 2}]


@pytest.mark.parametrize("texts", [PAIR, [PAIR[0], PAIR[1] | {"new": 7}]])
def test_a_record_of_several_is_given_back_exactly(texts: Any) -> None:
    read = made_up_identity().as_dict()
    read["calibration"]["texts"] = texts
    found = Identity.from_dict(json.loads(json.dumps(read)))
    assert found.as_dict() == read
    assert Identity.from_dict(found.as_dict()) == found


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("a", "texts is 'a'"),
        (PAIR[:1], "texts are not two or more objects"),
        ([PAIR[0], 3], "texts are not two or more objects"),
        ([PAIR[0], {"name": "b", "windows": 1}], r"calibration\.texts\.1\.sha256 is missing"),
        ([PAIR[0], PAIR[1] | {"windows": "2"}], r"calibration\.texts\.1\.windows is '2'"),
        ([PAIR[0], PAIR[1] | {"windows": 0}], "a text of 0 windows"),
    ],
)
def test_a_damaged_record_of_several_is_named(texts: Any, said: str) -> None:
    read = made_up_identity().as_dict()
    read["calibration"]["texts"] = texts
    with pytest.raises(Damaged, match=said):
        Identity.from_dict(read)


# -- found again ------------------------------------------------------------------------------------------------------


def test_windows_are_drawn_again_in_whatever_order_the_texts_come(
    make_model, both, first: Path, second: Path, tmp_path: Path
) -> None:
    loaded = make_model()
    store = unirank.analyze(loaded, tmp_path / "store", calibration=both)
    windows = drawn(loaded, both)
    moved = second.rename(tmp_path / "moved.txt")
    for text in (f"{first},{moved}", f"{moved},{first}"):
        assert redrawn_windows(loaded, store, text=text).equal(windows)
        assert is_text_of(loaded, store, text)
    assert not is_text_of(loaded, store, str(first))
    with pytest.raises(unirank.InputError, match=r"of which it knows first\.txt, second\.txt by name only"):
        text_to_redraw(store, None)
    with pytest.raises(unirank.InputError, match=r"on 2 texts \(first\.txt,second\.txt\), and '.*' is 1; give all of"):
        redrawn_windows(loaded, store, text=str(first))
    moved.write_text(moved.read_text() + " w3")
    assert not is_text_of(loaded, store, f"{first},{moved}")
    with pytest.raises(unirank.InputError, match=r"it is not the one that the store was made from \('first\.txt,sec"):
        redrawn_windows(loaded, store, text=f"{first},{moved}")


def test_texts_that_are_found_by_name_need_not_be_said(make_model, tmp_path: Path) -> None:
    loaded = make_model()
    calibration = unirank.Calibration("builtin,builtin-held-out", windows=4, window=24, batch=2)
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    assert text_to_redraw(store, None) == "builtin,builtin-held-out"
    assert unirank.make_workbench(loaded, store).windows.equal(drawn(loaded, calibration))


def test_a_finished_store_is_taken_for_its_texts_alone(make_model, both, tmp_path: Path) -> None:
    loaded = make_model()
    store = unirank.analyze(loaded, tmp_path / "store", calibration=both)
    before = contents(store.path)
    made = unirank.compress(loaded, 0.3, store=store.path, calibration=both.text, refine=unirank.Refine(), copy=True)
    assert made.identity == store.identity
    assert contents(store.path) == before
    with pytest.raises(unirank.StoreError, match="differs in"):
        unirank.compress(loaded, 0.3, store=store.path, calibration=both.text.partition(",")[0], copy=True)


@pytest.mark.slow
def test_another_process_draws_them_again(model_dir: Path, both, tmp_path: Path) -> None:
    loaded = unirank.load(model_dir, device="cpu")
    unirank.analyze(loaded, tmp_path / "store", calibration=both)
    program = (
        "import sys, unirank; loaded = unirank.load(sys.argv[1], device='cpu');"
        "bench = unirank.make_workbench(loaded, unirank.open_store(sys.argv[2]), text=sys.argv[3]);"
        "print(bench.windows.tolist())"
    )
    arguments = [sys.executable, "-c", program, str(model_dir), str(tmp_path / "store"), both.text]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == drawn(loaded, both).tolist()


def test_a_dry_run_reads_all_of_them(make_model, both, tmp_path: Path) -> None:
    loaded = make_model()
    assert dry_run(loaded, tmp_path / "store", calibration=both).layers == 3
    with pytest.raises(unirank.InputError, match="would give none of 1 windows"):
        dry_run(loaded, tmp_path / "store", calibration=dataclasses.replace(both, windows=1))


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_commands_take_several(run_unirank: Run, model_dir: Path, both, tmp_path: Path) -> None:
    common = ["--calib", both.text, "--windows", 8, "--window", 24, "--batch", 2, "--device", "cpu", "--json"]
    store, small = tmp_path / "store", tmp_path / "small"
    code, out, err = run_unirank("analyze", model_dir, "-o", store, *common, "--calib-shares", "3,1")
    assert (code, err) == (0, "")
    found = json.loads(out)["identity"]["calibration"]
    assert [text["windows"] for text in found["texts"]] == [6, 2]
    measured = ["--against", model_dir, "--allocator", "lems", "--set", "windows=2", "--device", "cpu", "--json"]
    code, _, err = run_unirank("plan", store, "-r", "0.3", "--calib", both.text, *measured)
    assert (code, err) == (0, "")
    options = ["--store", store, "--calib", both.text, "--refine", "0.5", "--device", "cpu", "--report"]
    code, _, err = run_unirank("compress", model_dir, "-r", "0.3", "-o", small, *options)
    assert code == 0, err
    card, page = (small / "README.md").read_text(), (tmp_path / "small.html").read_text()
    assert "`first.txt,second.txt`" in card
    assert "--calib first.txt,second.txt" in page
    assert "--calib-shares 6,2" in page
    code, _, err = run_unirank("analyze", model_dir, "-o", tmp_path / "dry", *common, "--dry-run")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ("3:1", "--calib-shares 3:1 is not legal; it is a number for each text, such as 3,1."),
        ("3", "--calib-shares = (3.0,) is not legal; there must be one for each text"),
        ("3,0", "--calib-shares = [3.0, 0.0] is not legal; every share is a number above 0."),
        ("100,1", "take more windows, or give it a larger share (--windows, --calib-shares)."),
    ],
)
def test_bad_shares_are_one_sentence(
    shares: str, said: str, run_unirank: Run, model_dir: Path, both, tmp_path: Path
) -> None:
    common = ["--calib", both.text, "--windows", 8, "--window", 24, "--device", "cpu"]
    code, out, err = run_unirank("analyze", model_dir, "-o", tmp_path / "s", *common, "--calib-shares", shares)
    assert (code, out) == (2, "")
    assert said in err
