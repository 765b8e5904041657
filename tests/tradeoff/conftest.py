"""A tiny dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import build


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("dense") / "llama"
    build("llama", num_hidden_layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
