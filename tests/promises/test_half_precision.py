"""No sum over activations is in the model's 16-bit dtype: an outlier channel neither overflows nor is rounded away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unirank.compression.second_fit import Pair
from unirank.finetuning.healing_streams import Group
from unirank.finetuning.output_metric import linear_of_the_output
from unirank.layerwise.backward import _Sums
from unirank.layerwise.clipping import clipped
from unirank.layerwise.recording import LayerCall, Streams
from unirank.types import LinearSpec

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TOKENS, N, OUTLIER = 600, 12, 3
CPU = torch.device("cpu")


def stream(dtype: torch.dtype, seed: int, *, size: float = 2e4) -> torch.Tensor:
    """`[TOKENS, N]` with one channel whose squares, and whose products with itself, are beyond float16."""
    x = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, OUTLIER] = size * (1 + 0.1 * x[:, OUTLIER])
    return x.to(dtype)


def error(found: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest error of `xᵀ y`, over the lengths of the two channels."""
    x, y = x.double(), y.double()
    return float(((found - x.T @ y) / (x.norm(dim=0)[:, None] * y.norm(dim=0))).abs().max())


@HALVES
def test_moments_of_the_second_pass(dtype: torch.dtype) -> None:
    dense, own = stream(dtype, 1), stream(dtype, 2)
    pair = Pair.zeros(N, CPU)
    for x, y in zip(dense.split(250), own.split(250), strict=True):
        pair.add(x, y)
    assert error(pair.cross, dense, own) < 1e-6
    assert error(pair.own, own, own) < 1e-6
    torch.testing.assert_close(pair.dense_sum, dense.double().sum(0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(pair.own_sum, own.double().sum(0), rtol=1e-12, atol=1e-9)


@HALVES
def test_moments_of_gradients(dtype: torch.dtype) -> None:
    x, g = stream(dtype, 1).view(2, -1, N), stream(dtype, 2, size=3e3).view(2, -1, N)
    sums = _Sums(nn.Linear(N, N), N, N, CPU)
    sums.windows = 2
    sums._adder(x)(g)
    found = sums.finish("linear")
    assert error(found.weight * TOKENS, g.flatten(0, 1), x.flatten(0, 1)) < 1e-6
    assert error(found.g * TOKENS, g.flatten(0, 1), g.flatten(0, 1)) < 1e-6
    rows = (g.double().mT @ x.double()).square().sum(2).mean(0)
    torch.testing.assert_close(found.rows, rows, rtol=1e-5, atol=0)


@HALVES
def test_lengths_of_tokens(dtype: torch.dtype) -> None:
    x = stream(dtype, 1)
    x[7] *= 3  # float16 holds it, and not its square
    found = clipped(x, 2.0)
    assert torch.equal(found[:7], x[:7])
    lengths = x.double().norm(dim=1)
    torch.testing.assert_close(found[7].double().norm(), 2 * lengths.median(), rtol=1e-2, atol=0)


class Adds(nn.Module):
    """A layer that adds what its second linear gives to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


@HALVES
def test_aims_of_healing_and_its_output_metric(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, call = Adds().to(dtype), LayerCall((), {}, None)
    hidden = stream(dtype, 1).view(4, -1, N)
    group = Group([[call]], [[call]], Streams([hidden], hidden[:1]), Streams([hidden], hidden[:1]))
    with torch.no_grad():
        output = call.run(layer, hidden)
    (aim,) = group.aims(layer, 0, 1.0)
    assert aim.target.dtype == aim.weight.dtype == torch.float32
    torch.testing.assert_close(1 / aim.weight.double(), output.double().square().sum(-1), rtol=1e-5, atol=0)
    assert float(aim.error(output)) == 0
    torch.testing.assert_close(float(aim.error(output * 0.5)), 0.25, rtol=1e-5, atol=0)
    specs = [LinearSpec(f"l.0.{name}", 0, "mlp", name, N, N) for name in ("first", "second")]
    assert linear_of_the_output(layer, "l.0.", specs, call, hidden) == "l.0.second"
