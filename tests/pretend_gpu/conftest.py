"""A tiny checkpoint, and jobs that run twice: on the CPU and on the pretend GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import unirank
from tests.support.pretend import Journal, pretend_gpu
from tests.support.tiny import save_dense

T = TypeVar("T")


@dataclass(frozen=True)
class Twice:
    """Runs a job on both devices. A GPU's attention is not the CPU's, so both take torch's plain one."""

    folder: Path
    text: Path
    dense: Path

    def __call__(self, job: Callable[[str, Path], T], **how: Any) -> tuple[T, T, Journal]:
        """What `job(device, folder)` gives on the CPU and on the GPU; `how`: arguments of `pretend_gpu`."""
        places = {device: self.folder / device for device in ("cpu", "cuda")}
        for place in places.values():
            place.mkdir()
        on_cpu = job("cpu", places["cpu"])
        with pretend_gpu(**({"bf16": False} | how)) as journal:
            on_gpu = job("cuda", places["cuda"])
        return on_cpu, on_gpu, journal

    @property
    def calibration(self) -> unirank.Calibration:
        return unirank.Calibration(text=str(self.text), windows=6, window=16, seed=0, batch=2)

    def load(self, device: str, **more: Any) -> unirank.LoadedModel:
        return unirank.load(self.dense, device=device, **more)

    def analyzed(self, device: str, folder: Path, **more: Any) -> tuple[unirank.LoadedModel, unirank.AnalysisStore]:
        loaded = self.load(device)
        more = {"calibration": self.calibration} | more
        return loaded, unirank.analyze(loaded, folder / "store", **more)

    def compressed(self, device: str, folder: Path, **more: Any) -> Path:
        """A checkpoint with 40 % removed."""
        more = {"calibration": self.calibration, "device": device} | more
        return unirank.compress(self.dense, 0.4, **more).save(folder / "small")

    def perplexity(self, model: Any) -> float:
        tokenizer = self.load("cpu").tokenizer
        return unirank.evaluate(model, tokenizer, text=str(self.text), window=16, limit=3).perplexity


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return save_dense(tmp_path_factory.mktemp("pretend") / "dense", tokenizer)


@pytest.fixture
def twice(tmp_path: Path, text_file: Path, tiny: Path) -> Iterator[Twice]:
    with sdpa_kernel(SDPBackend.MATH):
        yield Twice(tmp_path, text_file, tiny)


@pytest.fixture(autouse=True)
def _grad() -> Iterator[None]:
    before = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() == before
