"""A tiny dense checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import save_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense") / "tiny", tokenizer)
