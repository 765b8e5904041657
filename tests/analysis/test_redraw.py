"""Windows of an analysis, drawn again: the same ones, or one sentence that says whether text or tokenizer differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.tiny import WORDS
from unirank.analysis.redraw import redrawn_windows, text_to_redraw
from unirank.disk.hashing import sha256_tensors
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT


@pytest.fixture
def reading(make_model) -> unirank.LoadedModel:
    """A tiny Llama whose tokenizer knows some words of Python's documentation, so that other words are other tokens."""
    words = ["the", "of", "a", "is", "to", "in", "and", "for", "be", "an", "that", "it", "are", "as", "with", "or"]
    vocabulary = {word: index for index, word in enumerate([*WORDS[:2], *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    return dataclasses.replace(make_model(), tokenizer=tokenizer)


@pytest.mark.parametrize("text", [BUILTIN, BUILTIN_HELD_OUT])
def test_a_builtin_text_is_found_by_its_recorded_name(text: str, reading, tmp_path: Path) -> None:
    calibration = unirank.Calibration(text=text, windows=4, window=24, batch=2)
    store = unirank.analyze(reading, tmp_path / "store", calibration=calibration)
    assert text_to_redraw(store, None) == text
    windows = redrawn_windows(reading, store)
    assert windows.shape == (4, 24)
    assert sha256_tensors([("windows", windows)]) == store.identity.calibration.windows_sha256
    assert unirank.make_workbench(reading, store).windows.equal(windows)
    found = unirank.diagnose(store, reading, windows=2, permutations=20)
    assert found.missing == ()


def test_a_file_has_to_be_named_and_its_windows_to_be_the_stores(
    make_model, calibration, text_file: Path, tmp_path: Path
) -> None:
    loaded = make_model()
    store = unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    with pytest.raises(unirank.InputError, match=r"'words\.txt', a file that it knows by name only; .* text=\.$"):
        redrawn_windows(loaded, store)
    moved = tmp_path / "another-name.txt"
    moved.write_text(text_file.read_text())
    assert redrawn_windows(loaded, store, text=str(moved)).equal(redrawn_windows(loaded, store, text=str(text_file)))
    moved.write_text("w1 " + text_file.read_text())
    with pytest.raises(unirank.InputError, match=r"another-name\.txt does not give .* not the one .*'words\.txt'"):
        redrawn_windows(loaded, store, text=str(moved))
    with pytest.raises(unirank.InputError, match=r"missing\.txt"):
        redrawn_windows(loaded, store, text=str(tmp_path / "missing.txt"))


def test_another_tokenizer_is_named_as_the_cause(reading, make_model, calibration, text_file, tmp_path: Path) -> None:
    store = unirank.analyze(make_model(), tmp_path / "store", calibration=calibration)
    with pytest.raises(unirank.InputError, match="the tokenizer of tiny-llama makes other windows of it"):
        redrawn_windows(reading, store, text=str(text_file))


def test_a_builtin_text_of_another_python_is_an_error_and_a_missing_reading(
    reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = unirank.Calibration(windows=2, window=24, batch=2)
    store = unirank.analyze(reading, tmp_path / "store", calibration=calibration)
    monkeypatch.setattr("pydoc_data.topics.topics", {"a": "of the first " * 999, "b": "that is in it " * 999})
    with pytest.raises(unirank.InputError, match="another here than where the store was made"):
        unirank.make_workbench(reading, store)
    found = unirank.diagnose(store, reading, permutations=20)
    assert {missing.group for missing in found.missing} == {"outputs", "stream"}
    assert all("another here" in missing.reason for missing in found.missing)
