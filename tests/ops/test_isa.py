"""One kernel at three vector widths: AVX2 and AVX-512 give equal bits, and the portable width agrees to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

WIDTHS = ("base", "avx2", "avx512")
RUN = """
import sys
import torch
from safetensors.torch import save_file
from unirank import ops
torch.manual_seed(0)
results = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    x, y = (torch.randn(37, 301, dtype=torch.float64).to(dtype) for _ in range(2))
    state = torch.zeros(3, dtype=torch.float64)
    ops.cosine_accumulate_(state, x, y)
    gram, total = torch.zeros(301, 301, dtype=torch.float64), torch.zeros(301, dtype=torch.float64)
    ops.gram_accumulate_(gram, total, x)
    results |= {f"{dtype}.cosine": state, f"{dtype}.gram": gram, f"{dtype}.sum": total}
save_file(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What each width computes; a machine without the wide ones takes its widest, which is what users get there."""
    folder: Path = tmp_path_factory.mktemp("isa")
    for width in WIDTHS:
        environment = os.environ | {"UNIRANK_ISA": width}
        subprocess.run([sys.executable, "-c", RUN, folder / width], env=environment, check=True)
    return {width: load_file(folder / width) for width in WIDTHS}


def test_avx2_and_avx512_give_equal_bits(results) -> None:
    for name, value in results["avx512"].items():
        assert torch.equal(value, results["avx2"][name]), name


def test_the_portable_width_agrees_to_rounding(results) -> None:
    for name, value in results["avx512"].items():
        # The Gram of anything below float64 multiplies in float32.
        tolerance = 1e-13 if "cosine" in name or "float64" in name else 1e-5
        torch.testing.assert_close(results["base"][name], value, rtol=tolerance, atol=tolerance)
