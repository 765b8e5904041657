"""The same bytes for any number of threads, where MKL by itself splits sums by it: few tokens, many inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import unirank
from tests.support.stores import contents
from tests.support.threads import with_threads

NAME = "MKL_CBWR"
CPU = Path("/proc/cpuinfo")
on_intel = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and CPU.is_file() and "GenuineIntel" in CPU.read_text()),
    reason="MKL keeps the order of sums on Intel CPUs alone",
)


@on_intel
@pytest.mark.parametrize("tokens", [32, 128, 512])
@pytest.mark.parametrize("shape", [(64, 2048), (256, 2048), (576, 1536), (512, 4096)], ids=str)
def test_a_product_has_the_same_bits(tokens: int, shape: tuple[int, int]) -> None:
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, shape[1], generator=made), torch.randn(shape, generator=made)
    one, *others = with_threads(lambda: F.linear(x, weight), (1, 2, 3, 4))
    assert all(torch.equal(one, other) for other in others)


@on_intel
@pytest.mark.filterwarnings("ignore:Only 256 tokens calibrate")
def test_a_store_of_long_inputs_has_the_same_bytes(make_model, text_file: Path, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=64, intermediate_size=2048, num_hidden_layers=1)
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=64, batch=2, gradient_windows=4)
    places = iter(tmp_path / str(count) for count in (1, 2, 4))
    one, *others = with_threads(
        lambda: contents(unirank.analyze(model, next(places), calibration=calibration, scheme="kfac").path)
    )
    assert all(one == other for other in others)


@pytest.mark.parametrize(("before", "after"), [(None, "AUTO,STRICT"), ("COMPATIBLE", "COMPATIBLE"), ("", "")])
def test_what_is_set_already_stays(before: str | None, after: str) -> None:
    asked = {key: value for key, value in os.environ.items() if key != NAME}
    asked |= {} if before is None else {NAME: before}
    code = f"import os, unirank; print(os.environ[{NAME!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True)
    assert done.stdout.strip() == after, done.stderr
