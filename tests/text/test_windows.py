"""Texts are read whole or refused; windows sit exactly where the method puts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.tiny import WORDS, build
from unirank.text.windows import (
    BUILTIN,
    BUILTIN_HELD_OUT,
    Text,
    bos_of,
    calibration_windows,
    evaluation_windows,
    read_text,
    tokenize,
)

TOKENS = torch.arange(1000)
BOS = len(WORDS)


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a BOS that it puts in front by itself."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*WORDS, "<bos>"])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<bos>")


def test_builtin_texts_are_disjoint_parts_of_one_text() -> None:
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[key] for key in sorted(topics))
    first, last = read_text(BUILTIN).content, read_text(BUILTIN_HELD_OUT).content
    assert whole.startswith(first)
    assert whole.endswith(last)
    assert 0 < len(last) < len(first) < len(whole) - len(last)


def test_builtin_texts_are_the_same_each_time_and_have_their_own_hash() -> None:
    assert read_text(BUILTIN) == read_text(BUILTIN)
    assert read_text(BUILTIN).sha256 == read_text(BUILTIN).sha256 != read_text(BUILTIN_HELD_OUT).sha256


def test_text_file_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(" ä\n\nb \n".encode())
    assert read_text(str(file)) == Text("text.txt", " ä\n\nb \n")


@pytest.mark.parametrize("content", [b"", b" \n\t \r\n"])
def test_empty_text_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(unirank.InputError, match=r"text\.txt is empty"):
        read_text(str(file))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(unirank.InputError, match=r"text\.txt is not UTF-8"):
        read_text(str(file))


def test_missing_text_is_refused_with_what_is_legal(tmp_path: Path) -> None:
    with pytest.raises(unirank.InputError, match=r"is not a file.*'builtin'.*'builtin-held-out'.*'wikitext2'"):
        read_text(str(tmp_path / "none.txt"))
    with pytest.raises(unirank.InputError, match="is neither a file nor a dataset that loads"):
        read_text(str(tmp_path))


def test_tokens_are_those_of_the_words_without_special_tokens(tokenizer, bos_tokenizer) -> None:
    text = Text("t", "w5 w0\nw93 w5")
    model = build("llama")
    assert tokenize(tokenizer, text, model).tolist() == [7, 2, 95, 7]
    assert tokenize(bos_tokenizer, text, model).tolist() == [7, 2, 95, 7]


def test_token_without_embedding_is_refused(tokenizer) -> None:
    model = build("llama", vocab_size=95)
    assert tokenize(tokenizer, Text("t", "w92"), model).tolist() == [94]
    said = r"The text t has the token 'w93' \(id 95\), for which the model has no embedding \(it has 95\)"
    with pytest.raises(unirank.InputError, match=said):
        tokenize(tokenizer, Text("t", "w1 w93"), model)


def test_bos_is_used_only_where_the_tokenizer_adds_it_itself(tokenizer, bos_tokenizer) -> None:
    assert bos_of(tokenizer) is None
    assert bos_of(bos_tokenizer) == BOS
    bos_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert bos_tokenizer.bos_token_id == BOS
    assert bos_of(bos_tokenizer) is None


@pytest.mark.parametrize(("seed", "windows", "window"), [(0, 64, 512), (3, 5, 7)])
def test_calibration_windows_start_where_the_method_says(seed: int, windows: int, window: int) -> None:
    starts = torch.randint(0, len(TOKENS) - window, (windows,), generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([TOKENS[start : start + window] for start in starts])
    found = calibration_windows(TOKENS, windows=windows, window=window, seed=seed)
    assert torch.equal(found, expected)
    assert not torch.equal(found, calibration_windows(TOKENS, windows=windows, window=window, seed=seed + 1))


def test_bos_is_the_first_token_of_a_calibration_window_and_moves_no_start() -> None:
    plain = calibration_windows(TOKENS, windows=9, window=16, seed=0)
    with_bos = calibration_windows(TOKENS, windows=9, window=16, seed=0, bos=BOS + 5000)
    assert (with_bos[:, 0] == BOS + 5000).all()
    assert torch.equal(with_bos[:, 1:], plain[:, :-1])


def test_evaluation_windows_follow_each_other_and_drop_the_short_tail() -> None:
    found = evaluation_windows(TOKENS, window=300)
    assert torch.equal(found, TOKENS[:900].view(3, 300))
    assert torch.equal(evaluation_windows(TOKENS, window=300, limit=2), TOKENS[:600].view(2, 300))
    assert torch.equal(evaluation_windows(TOKENS[:600], window=300), TOKENS[:600].view(2, 300))


def test_bos_takes_a_place_in_each_evaluation_window_and_no_text_token_is_lost() -> None:
    found = evaluation_windows(TOKENS, window=300, bos=5000)
    assert found.shape == (3, 300)
    assert (found[:, 0] == 5000).all()
    assert torch.equal(found[:, 1:].flatten(), TOKENS[: 3 * 299])


def test_text_shorter_than_a_window_is_refused_with_both_lengths() -> None:
    message = "The text wiki is too short: it has 10 tokens, windows of {} need at least {}"
    with pytest.raises(unirank.InputError, match=message.format(10, 11)):
        calibration_windows(TOKENS[:10], windows=1, window=10, seed=0, name="wiki")
    with pytest.raises(unirank.InputError, match=message.format(11, 11)):
        evaluation_windows(TOKENS[:10], window=11, name="wiki")
    assert len(calibration_windows(TOKENS[:11], windows=3, window=10, seed=0)) == 3
    assert len(evaluation_windows(TOKENS[:10], window=10)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"windows": 0, "window": 8}, "windows = 0"), ({"windows": 1, "window": 1}, "of 1 tokens")],
)
def test_senseless_calibration_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(unirank.InputError, match=message):
        calibration_windows(TOKENS, seed=0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"limit": 0, "window": 8}, "limit = 0"), ({"window": 1}, "of 1 tokens")]
)
def test_senseless_evaluation_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(unirank.InputError, match=message):
        evaluation_windows(TOKENS, **arguments)


def test_line_ends_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "unix.txt").write_bytes(b"one\ntwo\n")
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    unix, dos = (read_text(str(tmp_path / f"{name}.txt")) for name in ("unix", "dos"))
    assert unix.content == dos.content
    assert unix.sha256 == dos.sha256
