"""The checks that tests/gpu runs on a GPU, on the pretend one: they must not fail there for a reason of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.on_device import CHECKS, Bench
from tests.support.pretend import pretend_gpu

# What has a test of its own here, on a smaller model, is left out: these are other models, dtypes and ends.
HERE = ("gemma3", "gpt-neox", "gpt2", "opt", "bfloat16", "float16", "saved and opened", "dry run")


@pytest.mark.parametrize("name", HERE)
def test_a_check_of_the_gpu(name: str, tmp_path: Path, tokenizer, text_file: Path) -> None:
    with pretend_gpu() as journal:
        CHECKS[name](Bench(torch.device("cuda"), tmp_path, tokenizer, text_file))  # raises where figures differ
    assert journal.count("to device") > 0, "nothing went to the GPU"
    assert journal.count("to host") > 0, "nothing came back from it"
