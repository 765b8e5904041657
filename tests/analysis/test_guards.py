"""Too few tokens, too short a text, a moment of deficient rank: said before the work, or from the store after it."""

from __future__ import annotations

import json
import re
import time
import warnings
from pathlib import Path

import pytest
import torch

import unirank
from tests.support.tiny import WORDS
from unirank.analysis.deficient import as_record, deficient, told
from unirank.text.capacity import Supply

WIDEST = 48  # inputs of the tiny Llama's down_proj


def words(path: Path, count: int) -> str:
    """A text of `count` tokens."""
    order = torch.randint(2, len(WORDS), (count,), generator=torch.Generator().manual_seed(3))
    path.write_text(" ".join(WORDS[i] for i in order.tolist()))
    return str(path)


def calibration(text: str, windows: int, window: int = 16) -> unirank.Calibration:
    return unirank.Calibration(text=text, windows=windows, window=window, batch=2, shrink=0)


def test_fewer_tokens_than_inputs_of_the_widest_linear_are_said_with_what_is_needed(make_model, tmp_path: Path) -> None:
    text = words(tmp_path / "t.txt", 400)
    said = (
        r"Only 32 tokens calibrate, and the widest linear \(.*down_proj\) has 48 inputs.* at least 3 windows of 16 \("
    )
    with pytest.warns(unirank.UnirankWarning, match=said) as caught:
        few = unirank.analyze(make_model(), tmp_path / "few", calibration=calibration(text, 2))
    assert caught[0].filename == __file__  # where the user's call is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unirank.analyze(make_model(), tmp_path / "enough", calibration=calibration(text, 3))
        unirank.analyze(make_model(), tmp_path / "blind", calibration=calibration(text, 2), scheme="svd")  # no moment
        unirank.analyze(make_model(), few.path, calibration=calibration(text, 2))  # finished: no work, no warning


def test_a_dry_run_says_it_too(make_model, model_dir: Path, tmp_path: Path) -> None:
    text = words(tmp_path / "t.txt", 400)
    with pytest.warns(unirank.UnirankWarning, match="Only 32 tokens calibrate"):
        unirank.dry_run(str(model_dir), tmp_path / "store", calibration=calibration(text, 2), device="cpu")


def test_a_text_that_is_too_short_for_all_says_how_long_it_must_be(make_model, tmp_path: Path) -> None:
    text = words(tmp_path / "t.txt", 40)
    with pytest.warns(unirank.UnirankWarning) as caught:
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration(text, 5))
    overlap, few = (str(one.message) for one in caught)
    assert "has 40 tokens, which is 2 windows of 16 side by side; 5 windows overlap" in overlap
    assert "Only 40 tokens calibrate" in few
    assert "and a text of 48 tokens" in few


def test_of_several_texts_each_has_its_own_number(make_model, tmp_path: Path) -> None:
    short, long = words(tmp_path / "short.txt", 33), words(tmp_path / "long.txt", 900)
    with pytest.warns(unirank.UnirankWarning, match=r"The text short\.txt has 33 tokens, which is 2 windows") as caught:
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration(f"{short},{long}", 8))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("tokens", "windows", "said"),
    [
        (16, 1, r"too short: it has 16 tokens, windows of 16 need at least 17"),
        (17, 2, r"at most 1 different window of 16; Calibration\.windows = 2 .* at most 1 window, which is what fits"),
        (160, 10_000, r"has 160 tokens, which give at most 144 different windows of 16; .* at most 10 windows"),
    ],
)
def test_a_window_is_never_given_twice_in_silence(
    make_model, tmp_path: Path, tokens: int, windows: int, said: str
) -> None:
    start = time.perf_counter()
    text = words(tmp_path / "t.txt", tokens)
    with pytest.raises(unirank.InputError, match=said):
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration(text, windows))
    assert time.perf_counter() - start < 5
    assert not (tmp_path / "store").exists()


def test_ten_windows_of_a_text_of_ten_are_no_matter(make_model, tmp_path: Path) -> None:
    text = words(tmp_path / "t.txt", 161)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unirank.analyze(make_model(), tmp_path / "store", calibration=calibration(text, 10))


def test_a_bos_takes_no_token_of_the_text() -> None:
    assert Supply("t", 60, 15, 4, 44).note is None
    assert "3 windows of 16" in (Supply("t", 60, 16, 4, 44).note or "")


def test_a_moment_of_deficient_rank_is_seen_in_the_store(make_model, tmp_path: Path) -> None:
    loaded = make_model()
    text = words(tmp_path / "t.txt", 400)
    for scheme in ("whiten", "afm"):
        with pytest.warns(unirank.UnirankWarning, match="Only 16 tokens"):
            store = unirank.analyze(
                loaded, tmp_path / scheme, calibration=calibration(text, 1), scheme=scheme, overwrite=True
            )
        found = {one.name: one for one in deficient(store)}
        wide = {spec.name for spec in loaded.linears if spec.k > 16}
        assert wide <= found.keys()
        assert all(one.rank <= 16 for one in found.values())
        assert as_record(deficient(store))[min(wide)]["k"] == 32
        assert re.search(r"\(at most \d+ of 32\)", told(deficient(store), len(store.linears)))


def test_one_of_full_rank_is_not(make_model, tmp_path: Path) -> None:
    text = words(tmp_path / "t.txt", 2000)
    for scheme in ("whiten", "svd"):
        store = unirank.analyze(make_model(), tmp_path / scheme, calibration=calibration(text, 24), scheme=scheme)
        assert deficient(store) == ()
    assert told((), 21) == ""


def test_the_command_line_says_it_in_one_yellow_line_in_its_own_words(
    model_dir: Path, run_unirank, tmp_path: Path
) -> None:
    text = words(tmp_path / "t.txt", 400)
    options = ["--calib", text, "--windows", 1, "--window", 16, "--device", "cpu"]
    for more in (["--dry-run"], ["--json"]):
        code, out, err = run_unirank("analyze", model_dir, "-o", tmp_path / "store", *options, *more)
        assert code == 0, err
        (line,) = [line for line in err.splitlines() if "warning" in line]
        assert line.startswith("warning: Only 16 tokens calibrate")
        assert "(--windows)" in line
        assert ".py" not in err
    record = json.loads(out)["deficient"]
    assert record["model.layers.0.self_attn.q_proj"] == {"rank": 16, "k": 32}
    code, out, err = run_unirank("analyze", model_dir, "-o", tmp_path / "store", *options)
    assert "show too few directions for" in out
    assert "warning" not in err  # the store was finished
