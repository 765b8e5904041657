"""Perplexity by the conventions of method 7, against a computation written here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import unirank
from tests.support.tiny import WORDS, build
from unirank import InputError, NonFiniteError
from unirank.evaluation.perplexity import EvalWindows


@torch.no_grad()
def mean_nll(model: PreTrainedModel, windows: list[list[int]]) -> float:
    """Nats per predicted token, one token after the other, summed in float64."""
    losses = []
    for ids in windows:
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-float(log_p[position, token]) for position, token in enumerate(ids[1:])]
    return math.fsum(losses) / len(losses)


def ids_of(text_file: Path) -> list[int]:
    return [WORDS.index(word) for word in text_file.read_text().split()]


def chunks(ids: list[int], size: int) -> list[list[int]]:
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


@pytest.fixture
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same words, with token 1 in front of every text by itself."""
    core = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", bos_token="<eos>")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_perplexity_is_the_token_mean_over_whole_windows(name, tokenizer, text_file) -> None:
    model, windows = build(name), chunks(ids_of(text_file), 96)
    report = unirank.evaluate(model, tokenizer, text=str(text_file), window=96)
    assert len(ids_of(text_file)) % 96 != 0  # a tail is there to drop
    assert (report.windows, report.predicted_tokens, report.bos) == (len(windows), len(windows) * 95, False)
    assert report.nll == pytest.approx(mean_nll(model, windows), rel=1e-5)
    assert report.perplexity == math.exp(report.nll)


def test_limit_takes_the_first_windows(tokenizer, text_file) -> None:
    model = build("llama")
    report = unirank.evaluate(model, tokenizer, text=str(text_file), window=32, limit=3)
    assert report.windows == 3
    assert report.nll == pytest.approx(mean_nll(model, chunks(ids_of(text_file), 32)[:3]), rel=1e-5)


def test_a_tokenizer_that_prepends_bos_gets_it_in_every_window(bos_tokenizer, text_file) -> None:
    model = build("llama")
    report = unirank.evaluate(model, bos_tokenizer, text=str(text_file), window=32, limit=5)
    windows = [[1, *chunk] for chunk in chunks(ids_of(text_file), 31)[:5]]
    assert (report.bos, report.predicted_tokens) == (True, 5 * 31)
    assert report.nll == pytest.approx(mean_nll(model, windows), rel=1e-5)


def test_a_tokenizer_that_only_defines_bos_gets_none(tokenizer, text_file) -> None:
    defines = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<eos>")
    report = unirank.evaluate(build("llama"), defines, text=str(text_file), window=32, limit=2)
    assert not report.bos
    assert report.nll == pytest.approx(mean_nll(build("llama"), chunks(ids_of(text_file), 32)[:2]), rel=1e-5)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_a_window_that_is_not_finite_is_an_error_that_names_it(damage, tokenizer, tmp_path: Path) -> None:
    model = build("llama-bias")
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS.index("w5")] = damage
    text = tmp_path / "text.txt"
    text.write_text(" ".join(["w1"] * 20 + ["w5"] + ["w1"] * 19))
    with pytest.raises(NonFiniteError, match="window 2 "):
        unirank.evaluate(model, tokenizer, text=str(text), window=8)
    assert math.isfinite(unirank.evaluate(model, tokenizer, text=str(text), window=8, limit=2).nll)


def test_tied_weights_count_once(tokenizer, text_file) -> None:
    tied, untied = (
        unirank.evaluate(build("llama", tie_word_embeddings=tie), tokenizer, text=str(text_file), window=8, limit=1)
        for tie in (True, False)
    )
    assert untied.parameters - tied.parameters == len(WORDS) * 32


def test_generate_is_greedy(tokenizer) -> None:
    model, ids = build("llama"), [3, 4, 5]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 1 not in ids[3:]  # no end of text in between
    for _ in range(2):
        assert unirank.generate(model, tokenizer, "w1 w2 w3", tokens=6) == tokenizer.decode(ids[3:])


def test_a_text_shorter_than_a_window_is_an_error_with_both_lengths(tokenizer, text_file) -> None:
    with pytest.raises(InputError, match="4000 tokens, windows of 4001"):
        unirank.evaluate(build("llama"), tokenizer, text=str(text_file), window=4001)


@pytest.mark.parametrize(("argument", "value"), [("window", 1), ("window", 0), ("limit", 0), ("text", "missing.txt")])
def test_an_illegal_argument_is_named(argument, value, tokenizer, text_file) -> None:
    with pytest.raises(InputError, match=f"{argument}.*{value}"):
        unirank.evaluate(build("llama"), tokenizer, **({"text": str(text_file), "window": 8} | {argument: value}))


def test_a_limit_beyond_the_text_is_said(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    said = r"The text words\.txt gives 125 windows of 32 tokens, and limit= asks for 1000\."
    with pytest.warns(unirank.UnirankWarning, match=said):
        report = unirank.evaluate(build("llama"), tokenizer, text=str(text_file), window=32, limit=1000)
    assert report.windows == 125
    exactly = unirank.evaluate(build("llama"), tokenizer, text=str(text_file), window=32, limit=125)  # warns not
    assert exactly == report


def test_a_perplexity_beyond_any_number_is_said(monkeypatch) -> None:
    prepared = EvalWindows("text", "sha", torch.ones(2, 4, dtype=torch.int64), False)
    monkeypatch.setattr("unirank.evaluation.perplexity.total_nll", lambda *_, **__: 6 * 800.0)
    with pytest.raises(NonFiniteError, match="The mean loss is 800 nats, so the perplexity is infinite"):
        prepared.measure(build("llama"))
