"""The same bytes for any number of threads, where MKL by itself splits sums by it: few tokens, many inputs.

On an Intel CPU MKL keeps the order when it is asked to, on others `unirank.matmul` does it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import unirank
from tests.support.stores import contents
from tests.support.threads import with_threads
from unirank.models import factoring

NAME = "MKL_CBWR"
with_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch multiplies without MKL")


@with_mkl
@pytest.mark.parametrize("tokens", [32, 128, 512])
@pytest.mark.parametrize("shape", [(64, 2048), (256, 2048), (576, 1536), (512, 4096)], ids=str)
def test_a_product_has_the_same_bits(tokens: int, shape: tuple[int, int]) -> None:
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, shape[1], generator=made), torch.randn(shape, generator=made)
    one, *others = with_threads(lambda: F.linear(x, weight), (1, 2, 3, 4))
    assert all(torch.equal(one, other) for other in others)


@with_mkl
@pytest.mark.filterwarnings("ignore:Only 256 tokens calibrate")
def test_a_store_of_long_inputs_has_the_same_bytes(make_model, text_file: Path, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=64, intermediate_size=2048, num_hidden_layers=1)
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=64, batch=2, gradient_windows=4)
    places = iter(tmp_path / str(count) for count in (1, 2, 4))
    one, *others = with_threads(
        lambda: contents(unirank.analyze(model, next(places), calibration=calibration, scheme="kfac").path)
    )
    assert all(one == other for other in others)


@with_mkl
@pytest.mark.parametrize(
    "function",
    [
        factoring.cholesky,
        lambda a: factoring.cholesky_ex(a, upper=True)[0],
        lambda a: torch.cat(factoring.qr(torch.cat([a, a.flip(1)]))),
        lambda a: factoring.solve_triangular(a.tril(), a, upper=False),
        lambda a: factoring.cholesky_solve(a, a.tril()),
    ],
    ids=["cholesky", "cholesky_ex", "qr", "solve_triangular", "cholesky_solve"],
)
def test_a_factorization_has_the_same_bits(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(600, 576, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = x.T @ x + torch.eye(576)
    one, *others = with_threads(lambda: function(matrix), (1, 2, 4))
    assert all(torch.equal(one, other) for other in others)


@with_mkl
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Only 256 tokens calibrate")
@pytest.mark.parametrize("scheme", ["afm", "kfac"])
def test_a_store_and_a_second_pass_of_tall_linears_have_the_same_bytes(
    scheme: str, make_model, text_file: Path, tmp_path: Path
) -> None:
    """Where tall matrices are brought to their square part, and the second pass solves by a Cholesky factor."""
    model = make_model("llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=4)
    calibration = unirank.Calibration(text=str(text_file), windows=4, window=64, batch=2, gradient_windows=4)
    places = iter(tmp_path / str(count) for count in (1, 2))

    def made() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
        place = next(places)
        options = {"scheme": scheme, "calibration": calibration, "form": "pivoted", "copy": True, "store": place}
        small = unirank.compress(model, 0.4, refine=unirank.Refine(centred=True, metric=scheme == "kfac"), **options)
        return contents(place), small.model.state_dict()

    (one, weights), (other, found) = with_threads(made, (1, 2))
    assert one == other
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(("before", "after"), [(None, "AUTO,STRICT"), ("COMPATIBLE", "COMPATIBLE"), ("", "")])
def test_what_is_set_already_stays(before: str | None, after: str) -> None:
    asked = {key: value for key, value in os.environ.items() if key != NAME}
    asked |= {} if before is None else {NAME: before}
    code = f"import os, unirank; print(os.environ[{NAME!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True)
    assert done.stdout.strip() == after, done.stderr
