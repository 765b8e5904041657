"""A tokenizer may have more tokens than the model has embeddings; only texts that have these tokens are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.tiny import WORDS, build
from unirank.evaluation.perplexity import generate
from unirank.evaluation.tasks import padding_tokenizer
from unirank.text.training_windows import Corpus, pack
from unirank.types import LoadedModel

PAD = len(WORDS)
SAID = rf"'\[PAD\]' \(id {PAD}\), for which the model has no embedding \(it has {PAD}\).*resize_token_embeddings"


@pytest.fixture
def padded(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, to which somebody added `[PAD]`."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"pad_token": "[PAD]"})
    assert made.pad_token_id == PAD
    return made


@pytest.fixture
def loaded(padded: PreTrainedTokenizerFast) -> LoadedModel:
    return unirank.describe(build("llama"), padded)


@pytest.fixture
def with_pad(text_file: Path, tmp_path: Path) -> str:
    """A text with one such token near its start."""
    file = tmp_path / "padded.txt"
    file.write_text("w1 w2 [PAD] " + text_file.read_text())
    return str(file)


def settings(text: str | Path) -> unirank.Calibration:
    return unirank.Calibration(text=str(text), windows=4, window=24, batch=2)


def test_such_a_model_is_compressed_saved_opened_tuned_healed_and_evaluated(loaded, text_file, tmp_path: Path) -> None:
    compressed = unirank.compress(loaded, 0.3, calibration=settings(text_file), copy=True)
    again = unirank.open_compressed(compressed.save(tmp_path / "out"), device="cpu")
    assert len(again.tokenizer) == PAD + 1
    healed = unirank.heal(again, settings(text_file), unirank.Heal(passes=1), work=tmp_path / "heal", against=loaded)
    short = unirank.Finetune(steps=1, batch=2, window=24)
    tuned = unirank.finetune(healed, str(text_file), short, work=tmp_path / "tune")
    assert unirank.evaluate(tuned.model, tuned.tokenizer, text=str(text_file), window=24, limit=2).windows == 2
    assert generate(tuned.model, tuned.tokenizer, "w1 w2", tokens=3)


def test_a_text_with_such_a_token_is_refused_everywhere(loaded, with_pad: str, text_file, tmp_path: Path) -> None:
    text = rf"The text padded\.txt has the token {SAID}"
    with pytest.raises(unirank.InputError, match=text):
        unirank.analyze(loaded, tmp_path / "store", calibration=settings(with_pad))
    assert not (tmp_path / "store").exists()
    with pytest.raises(unirank.InputError, match=text):
        unirank.evaluate(loaded.model, loaded.tokenizer, text=with_pad, window=24)
    with pytest.raises(unirank.InputError, match=rf"The prompt has the token {SAID}"):
        generate(loaded.model, loaded.tokenizer, "w1 [PAD]")
    compressed = unirank.compress(loaded, 0.3, calibration=settings(text_file), copy=True)
    with pytest.raises(unirank.InputError, match=text):
        unirank.heal(compressed, settings(with_pad), work=tmp_path / "heal", against=loaded)
    with pytest.raises(unirank.InputError, match=text):
        unirank.finetune(compressed, with_pad, unirank.Finetune(window=24), work=tmp_path / "tune")


def test_what_is_put_between_and_before_texts_is_asked_too(padded, text_file) -> None:
    model, words = build("llama"), text_file.read_text()
    padded.eos_token = "[PAD]"
    assert len(pack(Corpus("one", (words,)), padded, model, window=24)) > 100
    with pytest.raises(unirank.InputError, match=rf"The end of a document has the token {SAID}"):
        pack(Corpus("two", (words, words)), padded, model, window=24)
    begun = json.loads(padded.backend_tokenizer.to_str())
    begun["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[PAD]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[PAD]": {"id": "[PAD]", "ids": [PAD], "tokens": ["[PAD]"]}},
    }
    backend = type(padded.backend_tokenizer).from_str(json.dumps(begun))
    bos = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[PAD]", unk_token="<unk>")
    with pytest.raises(unirank.InputError, match=rf"The start of a window has the token {SAID}"):
        unirank.evaluate(model, bos, text=str(text_file), window=24)


def test_tasks_pad_with_eos_where_the_padding_has_no_embedding(padded, tokenizer) -> None:
    model = build("llama")
    changed = padding_tokenizer(padded, model)
    assert (changed.pad_token, padded.pad_token) == ("<eos>", "[PAD]")
    assert padding_tokenizer(tokenizer, model) is tokenizer
    assert padding_tokenizer(padded, build("llama", vocab_size=PAD + 1)) is padded
