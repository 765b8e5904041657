"""batched_eigh and batched_svd on the GPU: the cases of tests/ops, held to what torch makes on the same GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import FULL, SIZES, matrices, symmetric
from tests.ops.tolerance import assert_eigh, assert_svd
from unirank import ops

SHAPES = [(1, 1), (1, 33), (33, 1), (31, 33), (33, 31), (32, 32), (255, 32), (32, 257), (64, 64), (576, 192)]
REAL = [(576, 576), (1536, 576), (576, 1536)]


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("B", [0, 1, 3])
@pytest.mark.parametrize("N", [*SIZES, 576])
def test_eigh(cuda: torch.device, N: int, B: int, dtype: torch.dtype) -> None:
    a = symmetric(B, N, dtype)
    w, v = (t.cpu() for t in ops.batched_eigh(a.to(cuda)))
    assert_eigh(a, w, v)


def test_eigh_reads_only_the_lower_half(cuda: torch.device) -> None:
    a = symmetric(2, 33, torch.float64).to(cuda)
    dirty = a.tril() + torch.full_like(a, float("nan")).triu(1)
    for got, want in zip(ops.batched_eigh(dirty), ops.batched_eigh(a), strict=True):
        assert torch.equal(got, want)


def test_eigh_of_more_matrices_than_one_call_takes(cuda: torch.device) -> None:
    a = symmetric(40000, 3, torch.float32).to(cuda)
    w, v = ops.batched_eigh(a)
    torch.testing.assert_close(v @ torch.diag_embed(w) @ v.mT, a, rtol=0, atol=1e-4)


def assert_svd_on(device: torch.device, a: Tensor) -> None:
    u, s, vh = (t.cpu() for t in ops.batched_svd(a.to(device)))
    assert u.is_contiguous()
    assert vh.is_contiguous()
    assert_svd(a, (u, s, vh), [t.cpu() for t in torch.linalg.svd(a.to(device), full_matrices=False)])


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_svd(cuda: torch.device, M: int, N: int, dtype: torch.dtype) -> None:
    assert_svd_on(cuda, matrices(3, M, N, dtype))


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize(("M", "N"), REAL)
def test_svd_of_real_shapes(cuda: torch.device, M: int, N: int, dtype: torch.dtype) -> None:
    assert_svd_on(cuda, matrices(2, M, N, dtype))


@pytest.mark.parametrize("N", [32, 40, 200])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_hard_matrices(cuda: torch.device, scale: float, N: int) -> None:
    spectrum = torch.logspace(0, -12, N, dtype=torch.float64)
    q = torch.linalg.qr(matrices(1, N, N, torch.float64)[0]).Q
    a = ((q * spectrum) @ q.T * scale)[None].to(cuda)
    w, _ = ops.batched_eigh(a)
    _, s, _ = ops.batched_svd(a)
    for values in (w[0].flip(0), s[0]):
        torch.testing.assert_close(values.cpu() / scale, spectrum, rtol=1e-12, atol=1e-14 * N)


@pytest.mark.parametrize("N", [9, 64])
def test_rank_deficient_matrices(cuda: torch.device, N: int) -> None:
    a = matrices(2, N, 3, torch.float64) @ matrices(2, 3, N, torch.float64)
    assert_svd_on(cuda, a)
    _, s, _ = ops.batched_svd(torch.zeros(1, N, N, device=cuda))
    assert torch.equal(s.cpu(), torch.zeros(1, N))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("N", [9, 40])
def test_a_bad_matrix_is_named(cuda: torch.device, N: int, bad: float) -> None:
    a = symmetric(4, N, torch.float32)
    a[2, 5, 3] = bad
    for op in (ops.batched_eigh, ops.batched_svd):
        with pytest.raises(ValueError, match="matrix 2 of the batch is not finite"):
            op(a.to(cuda))


def test_non_contiguous_inputs(cuda: torch.device) -> None:
    a = matrices(6, 20, 80, torch.float64).to(cuda)[::2, :, ::2]
    for view in (a, a.mT):
        for got, want in zip(ops.batched_svd(view), ops.batched_svd(view.contiguous()), strict=True):
            assert torch.equal(got, want)
