"""Healing where memory is short: streams and aims are elsewhere, and the healed model has the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import unirank
from tests.support.healing import QUICK, weights
from tests.support.pretend import pretend_gpu
from unirank.analysis import hidden
from unirank.layerwise import recording
from unirank.types import LoadedModel


def healed(
    models: tuple[LoadedModel, unirank.CompressedModel], words: unirank.Calibration, work: Path
) -> dict[str, torch.Tensor]:
    dense, small = models
    with sdpa_kernel(SDPBackend.MATH):  # the attention that both devices have
        return weights(unirank.heal(small, words, QUICK, against=dense, work=work))


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of what goes into mapped files."""
    dtypes: list[torch.dtype] = []
    plain = recording.mapped_copy

    def copied(folder: Path, tensor: torch.Tensor) -> torch.Tensor:
        dtypes.append(tensor.dtype)
        return plain(folder, tensor)

    monkeypatch.setattr(recording, "mapped_copy", copied)
    return dtypes


def test_without_room_streams_and_aims_are_in_mapped_files(pair, words, tmp_path: Path, monkeypatch, mapped) -> None:
    expected = healed(pair(dtype=torch.bfloat16), words, tmp_path / "whole")
    assert not mapped
    monkeypatch.setattr(hidden, "free_bytes", lambda _: 0)
    found = healed(pair(dtype=torch.bfloat16), words, tmp_path / "short")
    assert {torch.float32, torch.bfloat16} == set(mapped)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("host", [1 << 40, 0])
def test_beside_a_gpu_they_are_in_the_hosts_memory_and_then_in_files(
    host: int, pair, words, tmp_path: Path, monkeypatch, mapped
) -> None:
    expected = healed(pair(), words, tmp_path / "cpu")
    dense, small = pair()
    with pretend_gpu(free=0, bf16=False) as gpu:
        monkeypatch.setattr(hidden.psutil, "virtual_memory", lambda: type("Memory", (), {"available": host}))
        dense.model.to(torch.device("cuda"))
        small.model.to(torch.device("cuda"))
        found = {name: tensor.cpu() for name, tensor in healed((dense, small), words, tmp_path / "gpu").items()}
    assert bool(mapped) == (host == 0)
    assert bool(gpu.count("pinned", "queues.py")) == (host > 0)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
