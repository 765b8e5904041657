"""The whole path on the GPU, every stage of it, against the CPU. tests/promises runs the same checks on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.on_device import CHECKS, Bench


@pytest.fixture
def bench(cuda: torch.device, tmp_path: Path, tokenizer, text_file: Path) -> Bench:
    return Bench(cuda, tmp_path, tokenizer, text_file)


@pytest.mark.parametrize("name", CHECKS)
def test_as_on_the_cpu(bench: Bench, name: str) -> None:
    CHECKS[name](bench)


@pytest.mark.parametrize("name", ["llama", "resumed", "second pass"])
def test_on_a_side_stream(bench: Bench, name: str) -> None:
    """What a thread copies must be whole there, though the caller works on another stream than the default one."""
    with torch.cuda.stream(torch.cuda.Stream()):
        CHECKS[name](bench)


def test_nothing_of_the_device_is_kept(bench: Bench) -> None:
    """Two analyses leave as much memory in use as one."""
    used = []
    for _ in range(2):
        bench.analyzed(bench.device)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[1] <= used[0]
