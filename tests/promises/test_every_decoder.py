"""No raw exception for any causal language model that the installed transformers knows: each works, or is refused.

docs/decoders.md has the outcome of every type, and this holds it; a type that a newer transformers brings fails here
until somebody has looked at it. test_architectures.py says of the usual ones that they are right.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.utils import logging

import unirank
from tests.support.decoder_matrix import PAGE, REASONS, WORKS, loads, outcome, page, reason_of, recorded
from tests.support.every_decoder import NOT_TINY, TYPES, build
from unirank.errors import InputError

# Few tokens, for speed: what is asked here is whether a kind of model is understood, and some are wider than that.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::unirank.UnirankWarning")]

BUILT = [kind for kind in TYPES if kind not in NOT_TINY]

# One or two of each way to be understood or refused, for what is read from a directory.
FROM_DISK = ("llama", "openai-gpt", "cpmant", "mamba", "mixtral", "dbrx", "doge", "reformer", "rwkv", "git", "blt")


@pytest.fixture(scope="module")
def windows(text_file: Path) -> unirank.Calibration:
    """4 windows of 16 tokens, two at a time."""
    return unirank.Calibration(text=str(text_file), windows=4, window=16, seed=0, batch=2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Some models say that a fast kernel is missing, once a layer."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def said(kind: str) -> tuple[str, str]:
    """What the page says of a type."""
    known = recorded()
    assert kind in known, f"transformers has a new type, {kind}; look at it, then run python -m tools.decoders"
    return known[kind]


@pytest.mark.parametrize("kind", BUILT)
def test_it_works_or_is_refused(
    kind: str, tokenizer: PreTrainedTokenizerFast, windows: unirank.Calibration, tmp_path: Path
) -> None:
    found = outcome(loads(build(kind), tokenizer, kind), windows, tmp_path)
    assert found == said(kind)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", FROM_DISK)
def test_from_a_directory_too(
    kind: str, stream: bool, tokenizer: PreTrainedTokenizerFast, windows: unirank.Calibration, tmp_path: Path
) -> None:
    build(kind).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    load = partial(unirank.load, tmp_path / "dense", device="cpu", stream=stream)
    what, reason = said(kind)
    if what == WORKS:
        unirank.compress(load(), 0.3, calibration=windows, store=tmp_path / "store")
        return
    with pytest.raises(InputError) as caught:
        unirank.compress(load(), 0.3, calibration=windows, store=tmp_path / "store")
    assert reason_of(str(caught.value)) == reason


@pytest.mark.parametrize("kind", NOT_TINY)
def test_what_transformers_cannot_build_is_refused(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if kind not in TYPES:
        pytest.skip(f"this transformers has no {kind}")
    with pytest.raises((AttributeError, ImportError)):
        build(kind)
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for stream in (False, True):
        with pytest.raises(InputError, match=r"^[^\n]*\.$"):
            unirank.load(tmp_path, device="cpu", stream=stream)


def test_the_page_has_every_type_and_most_work() -> None:
    known = recorded()
    assert set(known) >= set(BUILT)
    assert sum(what == WORKS for what, _ in known.values()) >= 0.9 * len(known)
    text = PAGE.read_text(encoding="utf-8")
    works = sum(what == WORKS for what, _ in known.values())
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{works} work and {len(known) - works} are refused" in readme
    assert text == page(known, NOT_TINY) or set(known) != set(BUILT)


def test_a_refusal_has_a_reason_of_the_list() -> None:
    assert reason_of("a.b and a.c are one weight; unirank compresses layers that share none.") in REASONS
    for sentence in ("No module reads it.", "are one weight", "are one\nweight."):
        with pytest.raises(AssertionError):
            reason_of(sentence)


def test_all_types_but_these_are_tried() -> None:
    assert len(BUILT) + sum(kind in TYPES for kind in NOT_TINY) == len(TYPES)
    assert len(NOT_TINY) == 3
    assert len(BUILT) > 100
