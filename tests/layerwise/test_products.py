"""Sums of outer products of two streams, in every dtype that a model may have."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode  # the documented way to see every op

from tests.support.pretend import pretend_gpu
from unirank.layerwise.products import ROWS, add_cross_moment_, cross_moment


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cross_moments_round_no_more_than_float32_and_do_not_overflow(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3 * ROWS + 17, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(3 * ROWS + 17, 5, generator=generator, dtype=torch.float64)
    x[:, 2] *= 1e4  # an outlier channel, whose products are beyond the range of float16
    y = (y + 0.5 * x[:, :5]).to(dtype)
    x = x.to(dtype)
    found, expected = cross_moment(x, y), x.double().T @ y.double()
    assert found.dtype == torch.float64
    scale = x.double().norm(dim=0)[:, None] * y.double().norm(dim=0)
    assert float(((found - expected) / scale).abs().max()) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_no_tokens_give_zeros() -> None:
    assert torch.equal(cross_moment(torch.empty(0, 3), torch.empty(0, 2)), torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("tokens", [100, ROWS + 100])
def test_sums_go_on_and_squares_are_those_of_each_sum_of_products(tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    total, squares = torch.zeros(300, 5, dtype=torch.float64), torch.zeros(300, dtype=torch.float64)
    added, wanted = torch.zeros_like(total), torch.zeros_like(squares)
    for _ in range(3):
        x, y = torch.randn(tokens, 300, generator=generator), torch.randn(tokens, 5, generator=generator)
        add_cross_moment_(total, x, y, squares)
        product = cross_moment(x, y)
        added += product
        wanted += product.square().sum(1)
    torch.testing.assert_close(total, added, rtol=1e-14, atol=0)
    torch.testing.assert_close(squares, wanted, rtol=1e-14, atol=0)


HALVES = [torch.bfloat16, torch.float16]


def outlying(dtype: torch.dtype, tokens: int = ROWS + 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Two streams that are alike, with one outlier channel whose squares are beyond float16, `[T, 6]`."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    x[:, 2] *= 1e4
    y = x + 0.1 * torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def relative(found: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest error of `xᵀ y`, over the lengths of the two channels."""
    scale = x.double().norm(dim=0)[:, None] * y.double().norm(dim=0)
    return float(((found - x.double().T @ y.double()) / scale).abs().max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_on_a_gpu_half_precision_is_multiplied_as_it_is_and_comes_out_in_float32(dtype, blocks: int) -> None:
    x, y = outlying(dtype, blocks * ROWS - 100)
    sums = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    with pretend_gpu(), Ops() as seen:
        total, squares, left, right = (tensor.to("cuda") for tensor in (*sums, x, y))
        add_cross_moment_(total, left, right, squares)
        found = total.cpu(), squares.cpu()
    assert seen.count("aten::mm.dtype") == blocks
    assert seen.count("aten::mm") == 0
    assert relative(found[0], x, y) < 1e-6
    add_cross_moment_(sums[0], x, y, sums[1])
    for one, wanted in zip(found, sums, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu_full_precision_keeps_its_own(dtype: torch.dtype) -> None:
    x, y = outlying(dtype)
    with pretend_gpu(), Ops() as seen:
        found = cross_moment(x.to("cuda"), y.to("cuda")).cpu()
    assert seen.count("aten::mm.dtype") == 0
    assert relative(found, x, y) < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_in_the_models_dtype_would_be_wrong(dtype: torch.dtype) -> None:
    """What the second pass did once, and what the bound above is for."""
    x, y = outlying(dtype)
    assert not relative((x.T @ y).double(), x, y) < 1e-4  # in float16 it is not even finite


class Ops(TorchDispatchMode):
    """Counts ops by name, with their overload where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, overload = func._schema.name, func._schema.overload_name
        self._seen.append(f"{name}.{overload}" if overload else name)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self._seen.count(name)
