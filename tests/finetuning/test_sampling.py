"""Windows that the dense model writes for distillation."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import unirank
from tests.support.healing import DISTILL, Killed
from unirank.compression.trainings import HEALED, training_rows
from unirank.errors import InputError
from unirank.finetuning import sampling
from unirank.types import LoadedModel


def write(dense: LoadedModel, folder: Path, **asked: Any) -> torch.Tensor:
    options: dict[str, Any] = {"windows": 10, "window": 12, "seed": 0, "progress": lambda *_: None} | asked
    return sampling.sample(dense.model, dense.tokenizer, folder=folder, **options)


def broken(*_: Any, **__: Any) -> None:
    raise NotImplementedError("no cache")


def test_windows_are_the_seeds(pair, tmp_path: Path) -> None:
    dense, _ = pair()
    state, configuration = torch.get_rng_state(), dense.model.generation_config
    first, again = write(dense, tmp_path / "a"), write(dense, tmp_path / "b")
    assert first.shape == (10, 12)
    assert first.dtype == torch.int64
    assert torch.equal(first, again)
    assert len({tuple(window.tolist()) for window in first}) == 10
    assert torch.equal(torch.get_rng_state(), state)
    assert dense.model.generation_config is configuration


def test_a_window_begins_with_any_token_that_is_no_special_one(pair, tmp_path: Path) -> None:
    dense, _ = pair()
    special = set(dense.tokenizer.all_special_ids)
    begun = write(dense, tmp_path / "a", windows=200, window=1)[:, 0].tolist()
    assert special
    assert not special & set(begun)
    assert len(set(begun)) > 40


def test_bos_comes_first_where_the_tokenizer_puts_one(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = pair()
    monkeypatch.setattr(sampling, "bos_of", lambda *_: 1)
    windows = write(dense, tmp_path / "a")
    assert windows.shape == (10, 12)
    assert (windows[:, 0] == 1).all()
    assert len(set(windows[:, 1].tolist())) > 1


def test_what_the_models_own_configuration_says_of_writing_plays_no_part(pair, tmp_path: Path) -> None:
    dense, _ = pair()
    plain = write(dense, tmp_path / "a")
    own = dense.model.generation_config
    own.eos_token_id = list(range(60))  # all but ended at once
    own.repetition_penalty, own.top_k, own.max_length = 5.0, 1, 3
    assert torch.equal(write(dense, tmp_path / "b"), plain)


def test_what_is_written_is_what_the_model_finds_likely(pair, tmp_path: Path) -> None:
    dense, _ = pair()
    with torch.no_grad():
        dense.model.lm_head.weight.mul_(8)  # a model with opinions
    windows = write(dense, tmp_path / "a", windows=40)

    def loss(ids: torch.Tensor) -> float:
        with torch.no_grad():
            return float(dense.model(input_ids=ids, labels=ids).loss)

    other = windows.flatten()[torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(0))]
    assert loss(windows) < 0.8 * loss(other.view_as(windows))


def test_parts_that_were_written_are_not_written_again(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = pair()
    monkeypatch.setattr(sampling, "_AT_ONCE", 4 * 12)
    whole = write(dense, tmp_path / "whole")
    told: list[tuple[str, int, int]] = []

    def killed(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))
        if done > 60:  # of 120 tokens: in the second part
            raise Killed

    with pytest.raises(Killed):
        write(dense, tmp_path / "work", progress=killed)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"sampled-00000.safetensors"}
    told.clear()
    assert torch.equal(write(dense, tmp_path / "work", progress=lambda *one: told.append(one)), whole)
    assert told[0][1] > 48
    assert told[-1] == ("sample", 120, 120)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_part_that_is_damaged_is_written_again(pair, tmp_path: Path) -> None:
    dense, _ = pair()
    whole = write(dense, tmp_path / "a")
    (tmp_path / "a" / "sampled-00000.safetensors").write_bytes(b"cut off")
    assert torch.equal(write(dense, tmp_path / "a"), whole)


def distilled(pair: Any, words: unirank.Calibration, work: Path, **asked: Any) -> tuple[dict[str, Any], set[str]]:
    dense, small = pair()
    settings = dataclasses.replace(DISTILL, passes=0, distill_steps=3, **asked)
    stages = set()
    after = unirank.heal(small, words, settings, against=dense, work=work, progress=lambda stage, *_: stages.add(stage))
    assert after.training is not None
    return after.training, stages


@pytest.mark.parametrize(
    ("share", "read", "written", "line"),
    [
        (0.0, 20, 0, "on 20 windows of 24 tokens of "),
        (0.25, 15, 5, " and 5 that the dense model wrote"),
        (1.0, 0, 20, "on 20 windows that the dense model wrote"),
    ],
)
def test_the_share_is_what_was_asked_for(share, read, written, line, pair, words, tmp_path: Path) -> None:
    training, stages = distilled(pair, words, tmp_path / "work", distill_sampled=share)
    assert training["data"]["whole_windows"] == read
    assert training["data"]["sampled_windows"] == written
    assert ("sample" in stages) == (written > 0)
    assert line in training_rows(training)[HEALED]


@pytest.mark.filterwarnings("ignore::unirank.errors.UnirankWarning")
def test_where_the_text_is_short_the_model_writes_more(pair, words, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(" ".join(Path(words.text).read_text().split()[:60]))
    few = dataclasses.replace(words, text=str(short), windows=3)
    training, _ = distilled(pair, few, tmp_path / "work")
    places = 60 - 25 - 24  # to begin, before the held-out end: of the 12 windows it was to give 6
    assert training["data"]["whole_windows"] == min(6, places)
    training, _ = distilled(pair, few, tmp_path / "more", batch=10)
    assert training["data"]["whole_windows"] == places
    assert training["data"]["sampled_windows"] == 30 - places


def test_a_model_that_cannot_write_is_refused_first(
    pair, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = pair()
    monkeypatch.setattr(type(dense.model), "generate", broken)
    with pytest.raises(
        InputError, match=r"^LlamaForCausalLM cannot generate text \(no cache\), .*; set distill_sampled to 0\.$"
    ):
        unirank.heal(small, words, DISTILL, against=dense, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    plain = dataclasses.replace(DISTILL, passes=0, distill_steps=1, distill_sampled=0.0)
    assert unirank.heal(small, words, plain, against=dense, work=tmp_path / "work").training is not None


def test_a_tokenizer_of_special_tokens_alone_is_refused(pair, tmp_path: Path) -> None:
    dense, _ = pair()
    dense = dataclasses.replace(dense, tokenizer=copy.deepcopy(dense.tokenizer))
    dense.tokenizer.add_special_tokens({"additional_special_tokens": list(dense.tokenizer.get_vocab())})
    with pytest.raises(InputError, match=r"^All tokens of the tokenizer are special ones"):
        write(dense, tmp_path / "a")


@pytest.mark.parametrize("preset", ["distilled", "healed"])
def test_a_compression_is_refused_before_its_analysis(
    preset: str, make_model, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_model("llama")
    monkeypatch.setattr(type(dense.model), "generate", broken)
    compress = partial(unirank.compress, dense, 0.4, preset=preset, calibration=words, store=tmp_path / "store")
    if preset == "healed":  # nobody has to write
        assert compress().training is not None
        return
    with pytest.raises(InputError, match=r"^LlamaForCausalLM cannot generate text \(no cache\)"):
        compress()
    assert not (tmp_path / "store").exists()


def test_another_seed_shares_no_window(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = pair()
    monkeypatch.setattr(sampling, "_AT_ONCE", 4 * 12)
    one, two = ({tuple(ids.tolist()) for ids in write(dense, tmp_path / f"{seed}", seed=seed)} for seed in (0, 1))
    assert len(one | two) == 20
    assert write(dense, tmp_path / "large", seed=2**62).shape == (10, 12)
