"""The bounds that results of a GPU are held to: what a backward stable method makes passes, what is wrong does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ops.cases import FULL, activations, matrices, run_gram, symmetric
from tests.ops.tolerance import assert_eigh_on_gpu, assert_moments_on_gpu, assert_svd_on_gpu
from unirank import ops


def turned(q: Tensor, angle: float) -> Tensor:
    """The first and the last column, turned against each other: still orthonormal."""
    c, s = math.cos(angle), math.sin(angle)
    first, last = q[..., :1], q[..., -1:]
    return torch.cat([c * first + s * last, q[..., 1:-1], c * last - s * first], dim=-1)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("N", [1, 33, 100])
def test_eigh(N: int, dtype: torch.dtype) -> None:
    a = symmetric(2, N, dtype)
    w, v = ops.batched_eigh(a)
    assert_eigh_on_gpu(a, w, v)
    wrong = 1e-2 if dtype == torch.float32 else 1e-6
    spoilt = [(w * (1 + wrong), v), (w, v * (1 + wrong))]
    if N > 1:
        spoilt += [(w, turned(v, wrong)), (w.flip(1), v.flip(2))]
    for values, vectors in spoilt:
        with pytest.raises(AssertionError):
            assert_eigh_on_gpu(a, values, vectors.contiguous())


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize(("M", "N"), [(33, 20), (20, 33)])
def test_svd(M: int, N: int, dtype: torch.dtype) -> None:
    a = matrices(2, M, N, dtype)
    u, s, vh = ops.batched_svd(a)
    assert_svd_on_gpu(a, (u, s, vh))
    wrong = 1e-2 if dtype == torch.float32 else 1e-6
    for spoilt in [(u * (1 + wrong), s, vh), (u, s * (1 + wrong), vh), (turned(u, wrong), s, vh), (u, s, -vh)]:
        with pytest.raises(AssertionError):
            assert_svd_on_gpu(a, spoilt)


@pytest.mark.parametrize("kept", FULL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments(dtype: torch.dtype, kept: torch.dtype) -> None:
    x = activations(3000, 20, dtype)
    gram, mean = run_gram(ops.gram_accumulate_, x, kept)
    assert_moments_on_gpu(gram, mean, x)
    without_a_token, its_mean = run_gram(ops.gram_accumulate_, x[:-1], kept)
    lopsided = gram.clone()
    lopsided[3, 2] *= 1 + 1e-3
    for wrong, wrong_mean in ((without_a_token, mean), (gram, its_mean), (lopsided, mean)):
        with pytest.raises(AssertionError):
            assert_moments_on_gpu(wrong, wrong_mean, x)
