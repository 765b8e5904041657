"""Windows are as long as a model has positions: longer ones are refused before any work, in every command."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import unirank
from tests.support.tiny import COMMON, build
from unirank.errors import InputError
from unirank.text.training_windows import Corpus, pack
from unirank.text.windows import check_window, fitting_window, longest_window, read_text

POSITIONS = COMMON["max_position_embeddings"]
OLD = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 4, "dff": 48}
BERT = {"is_decoder": True, "embedding_size": 32}
BART = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}

# A table of positions, and how many windows have: RoBERTa's begin behind the padding index.
LIMITED: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "gpt2": (T.GPT2Config, OLD, POSITIONS),
    "openai-gpt": (T.OpenAIGPTConfig, OLD, POSITIONS),
    "gpt-bigcode": (T.GPTBigCodeConfig, OLD, POSITIONS),
    "gpt-neo": (T.GPTNeoConfig, {"num_heads": 4, "attention_types": [[["global"], 1]]}, POSITIONS),
    "opt, two places are skipped": (T.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}, POSITIONS),
    "biogpt, two places are skipped": (T.BioGptConfig, {}, POSITIONS),
    "gptj, a buffer": (T.GPTJConfig, OLD, POSITIONS),
    "codegen, a buffer": (T.CodeGenConfig, OLD, POSITIONS),
    "ctrl, a buffer": (T.CTRLConfig, OLD, POSITIONS),
    "bart": (T.BartConfig, BART, POSITIONS),
    "bert": (T.BertConfig, BERT, POSITIONS),
    "roberta, padding first": (T.RobertaConfig, BERT, POSITIONS - 2),
}
UNLIMITED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "llama": (T.LlamaConfig, {}),
    "gemma3": (T.Gemma3TextConfig, {"head_dim": 8}),
    "gpt-neox": (T.GPTNeoXConfig, {}),
    "phi3": (T.Phi3Config, {}),
    "falcon": (T.FalconConfig, {}),
    "bloom, alibi": (T.BloomConfig, {"n_layer": 2, "n_head": 4}),
    "xglm, a table that grows": (T.XGLMConfig, {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4}),
    "as many tokens as positions": (T.LlamaConfig, {"vocab_size": POSITIONS}),
}


def make(cls: Callable[..., Any], changes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(cls(**(COMMON | {"num_hidden_layers": 1} | changes))).eval()


@torch.no_grad()
def run(model: PreTrainedModel, window: int) -> None:
    model(input_ids=torch.arange(window)[None] % 90 + 2, use_cache=False)


@pytest.mark.parametrize("name", LIMITED)
def test_the_longest_window_is_the_longest_that_runs(name: str) -> None:
    cls, changes, longest = LIMITED[name]
    model = make(cls, changes)
    assert longest_window(model) == longest
    run(model, longest)
    with pytest.raises((IndexError, RuntimeError)):  # what the user would see
        run(model, longest + 1)
    check_window(model, longest)
    with pytest.raises(
        InputError,
        match=rf"^Calibration\.window = {longest + 1} is not legal: {type(model).__name__} has a table of {longest} "
        rf"positions \([\w.]+\), so a window has at most {longest} tokens\.$",
    ):
        check_window(model, longest + 1, "Calibration.window")
    assert fitting_window(model, 10_000) == longest
    assert fitting_window(model, 16) == 16


@pytest.mark.parametrize("name", UNLIMITED)
def test_a_model_without_such_a_table_runs_beyond_its_positions(name: str) -> None:
    model = make(*UNLIMITED[name])
    assert longest_window(model) is None
    run(model, POSITIONS + 9)
    check_window(model, 10**6)
    assert fitting_window(model, 10_000) == 10_000


def test_a_rotary_cache_is_no_table() -> None:
    model = make(T.LlamaConfig, {})
    layer = model.get_submodule("model.layers.0")
    for name in ("cos_cached", "sin_cached"):
        layer.register_buffer(name, torch.zeros(POSITIONS, 8), persistent=False)
    assert longest_window(model) is None
    layer.add_module("positions", nn.Embedding(POSITIONS, 8))
    assert longest_window(model) == POSITIONS


@pytest.fixture
def no_tokens(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which fails where it is used: nothing is tokenised for a window that is refused."""
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("work was done"))
    return tokenizer


ARCHITECTURES = ("gpt2", "opt")
REFUSED = rf"window = {POSITIONS + 1} is not legal: \w+ has a table of {POSITIONS} positions"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_work_is_done_for_a_window_that_is_too_long(
    name: str, no_tokens: PreTrainedTokenizerFast, tmp_path: Path, text_file: Path
) -> None:
    model = build(name)
    loaded = unirank.describe(model, no_tokens)
    calibration = unirank.Calibration(str(text_file), windows=2, window=POSITIONS + 1)
    with pytest.raises(InputError, match=r"^Calibration\." + REFUSED):
        unirank.analyze(loaded, tmp_path / "store", calibration=calibration)
    assert not (tmp_path / "store").exists()
    with pytest.raises(InputError, match="^" + REFUSED):
        unirank.evaluate(model, no_tokens, text=str(text_file), window=POSITIONS + 1)
    corpus = Corpus("words", (read_text(str(text_file)).content,))
    with pytest.raises(InputError, match=r"^Finetune\." + REFUSED):
        pack(corpus, no_tokens, model, window=POSITIONS + 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_windows_of_all_positions_run(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text_file: Path
) -> None:
    loaded = unirank.describe(build(name), tokenizer)
    calibration = unirank.Calibration(str(text_file), windows=2, window=POSITIONS, batch=2)
    assert unirank.analyze(loaded, tmp_path / "store", calibration=calibration).complete
    report = unirank.evaluate(loaded.model, tokenizer, text=str(text_file), limit=1)
    assert report.window == POSITIONS
    assert unirank.evaluate(loaded.model, tokenizer, text=str(text_file), limit=1, window=64).window == 64


def test_a_rotary_model_is_evaluated_on_the_usual_windows(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    assert unirank.evaluate(build("llama"), tokenizer, text=str(text_file), limit=1).window == 1024


def test_a_sample_ends_with_the_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("gpt2", n_positions=16, eos_token_id=None)
    model.generation_config.eos_token_id = None
    assert len(unirank.generate(model, tokenizer, "w1 " * 10).split()) == 7  # the last is not read
    assert len(unirank.generate(model, tokenizer, "w1 " * 16).split()) == 1
    assert len(unirank.generate(model, tokenizer, "w1 " * 10, tokens=3).split()) == 3
    with pytest.raises(InputError, match="The prompt has 17 tokens; GPT2LMHeadModel has positions for at most 16"):
        unirank.generate(model, tokenizer, "w1 " * 17)


def test_fine_tuning_refuses_for_model_and_teacher(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text_file: Path
) -> None:
    loaded = unirank.describe(build("gpt2"), tokenizer)
    calibration = unirank.Calibration(str(text_file), windows=4, window=32, batch=2)
    compressed = unirank.compress(loaded, 0.3, calibration=calibration)
    settings = unirank.Finetune(steps=1, window=POSITIONS + 1)
    with pytest.raises(InputError, match=r"^Finetune\." + REFUSED):
        unirank.finetune(compressed, str(text_file), settings, work=tmp_path / "work")
    settings = dataclasses.replace(settings, window=64, distill=0.5)
    with pytest.raises(InputError, match=r"^Finetune\.window = 64 is not legal: .* has a table of 32 positions"):
        unirank.finetune(
            compressed, str(text_file), settings, work=tmp_path / "work", against=build("gpt2", n_positions=32)
        )
