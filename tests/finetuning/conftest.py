"""Models and texts of the tests of healing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import unirank
from tests.support.tiny import WORDS, build


@pytest.fixture
def words(text_file: Path) -> unirank.Calibration:
    """20 windows of 24 tokens."""
    return unirank.Calibration(text=str(text_file), windows=20, window=24)


@pytest.fixture
def pair(make_model, calibration):
    """`pair("llama") -> (dense, compressed)`, both in memory, 40 % removed."""

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any):
        dense = make_model(name)
        dense.model.to(dtype)
        return dense, unirank.compress(dense, 0.4, calibration=calibration, copy=True, **options)

    return make


@pytest.fixture
def on_disk(tokenizer: PreTrainedTokenizerFast, calibration: unirank.Calibration, tmp_path: Path) -> Path:
    """A directory with `dense`, a tiny Gemma, and `small`, 40 % removed."""
    build("gemma3").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    unirank.compress(tmp_path / "dense", 0.4, calibration=calibration, device="cpu").save(tmp_path / "small")
    return tmp_path


@pytest.fixture
def counting(tmp_path: Path) -> unirank.Calibration:
    """Words that count in steps of 7."""
    (tmp_path / "counting.txt").write_text(" ".join(WORDS[2 + 7 * i % 94] for i in range(1000)))
    return unirank.Calibration(text=str(tmp_path / "counting.txt"), windows=20, window=24)
