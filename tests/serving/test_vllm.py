"""A real vLLM reads compressed checkpoints: the same log-probabilities as transformers, or one sentence.

`make test-vllm` installs vLLM into an environment of its own; elsewhere these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.support.served import SERVED, of_transformers, of_vllm, write_checkpoint
from unirank.types import FORMS, Form

if importlib.util.find_spec("vllm") is None and not os.environ.get("UNIRANK_REQUIRE_VLLM"):
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

pytestmark = pytest.mark.slow
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

PROMPTS = [[5, 17, 3, 80, 41, 9, 9, 22, 63, 50], [2, 90, 11], list(range(2, 40))]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.01}

# What is served: the architecture, the form, the dtype, the scheme ("afm" adds biases).
PLAIN = [(name, form, "float32", "whiten") for name in SERVED for form in FORMS]
OTHERS = [("llama", form, dtype, "whiten") for form in FORMS for dtype in ("bfloat16", "float16")]
BIASED = [(name, form, "float32", "afm") for name in ("llama", "llama, biases", "gpt-neox") for form in FORMS]
CASES = [*PLAIN, *OTHERS, *BIASED]


@dataclass(frozen=True)
class Made:
    """A checkpoint, and the log-probabilities that transformers gives the prompts."""

    folder: Path
    logprobs: list[list[float]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, text_file: Path) -> Any:
    """Every case that is asked for, before vLLM runs: it changes the classes of transformers that it serves through."""
    folder, found = tmp_path_factory.mktemp("served"), {}
    for index, case in enumerate(CASES):
        architecture, form, dtype, scheme = case
        out = folder / str(index)
        write_checkpoint(out, architecture, tokenizer, text_file, form=form, scheme=scheme, dtype=getattr(torch, dtype))
        found[case] = Made(out, of_transformers(out, PROMPTS, dtype))
    return found


def off(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The largest difference of a log-probability."""
    return max(abs(a - b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_vllm_says_what_transformers_says(case: tuple[str, Form, str, str], made: Any) -> None:
    folder, theirs = made[case].folder, made[case].logprobs
    assert off(of_vllm(folder, PROMPTS, case[2]), theirs) < TOLERANCE[case[2]]
