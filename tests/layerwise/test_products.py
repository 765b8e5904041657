"""Sums of outer products of two streams, in every dtype that a model may have."""

from __future__ import annotations

import pytest
import torch

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
