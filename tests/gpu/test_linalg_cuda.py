"""batched_eigh and batched_svd on the GPU: the cases of tests/ops, held to the bounds of a backward stable method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import FULL, SIZES, matrices, symmetric
from tests.ops.tolerance import STABLE, assert_eigh_on_gpu, assert_svd_on_gpu
from unirank import ops
from unirank.errors import is_out_of_memory

SHAPES = [(1, 1), (1, 33), (33, 1), (31, 33), (33, 31), (32, 32), (255, 32), (32, 257), (64, 64), (576, 192)]
REAL = [(576, 576), (1536, 576), (576, 1536)]


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("B", [0, 1, 3])
@pytest.mark.parametrize("N", [*SIZES, 576])
def test_eigh(cuda: torch.device, N: int, B: int, dtype: torch.dtype) -> None:
    a = symmetric(B, N, dtype)
    w, v = (t.cpu() for t in ops.batched_eigh(a.to(cuda)))
    assert_eigh_on_gpu(a, w, v)


def test_eigh_reads_only_the_lower_half(cuda: torch.device) -> None:
    a = symmetric(2, 33, torch.float64).to(cuda)
    dirty = a.tril() + torch.full_like(a, float("nan")).triu(1)
    for got, want in zip(ops.batched_eigh(dirty), ops.batched_eigh(a), strict=True):
        assert torch.equal(got, want)


def test_eigh_of_more_matrices_than_one_call_takes(cuda: torch.device) -> None:
    a = symmetric(40000, 3, torch.float32).to(cuda)
    w, v = ops.batched_eigh(a)
    assert_eigh_on_gpu(a.cpu(), w.cpu(), v.cpu())


def assert_svd_on(device: torch.device, a: Tensor) -> None:
    u, s, vh = (t.cpu() for t in ops.batched_svd(a.to(device)))
    assert u.is_contiguous()
    assert vh.is_contiguous()
    assert_svd_on_gpu(a, (u, s, vh))


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
        torch.testing.assert_close(values.cpu() / scale, spectrum, rtol=0, atol=STABLE * N * 2.0**-52)


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


@pytest.mark.parametrize("N", [9, 40])
def test_a_bad_matrix_leaves_no_error_behind(cuda: torch.device, N: int) -> None:
    good, bad = symmetric(3, N, torch.float64).to(cuda), torch.full((1, N, N), float("nan"), device=cuda)
    for op in (ops.batched_eigh, ops.batched_svd):
        want = op(good)
        with pytest.raises(ValueError, match="matrix 0 of the batch is not finite"):
            op(bad)
        torch.cuda.synchronize()
        for got, expected in zip(op(good), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("N", [33, 300])
def test_singular_matrices_that_the_polar_method_perturbs(cuda: torch.device, N: int, dtype: torch.dtype) -> None:
    # Conditions of 1e30 and exact zeros: whether QR iteration repairs them or not, they must be as exact as others.
    spectrum = torch.logspace(0, -30, N, dtype=torch.float64)
    q, r = (torch.linalg.qr(matrices(1, N, N, torch.float64)[0] + i).Q for i in range(2))
    a = torch.stack([(q * spectrum) @ r, (q * (spectrum > 1e-6)) @ r, torch.ones(N, N, dtype=torch.float64)]).to(dtype)
    assert_svd_on(cuda, a)


def test_too_little_memory_is_told(cuda: torch.device) -> None:
    huge = torch.zeros(1, 1, 1, device=cuda).expand(2**20, 2**12, 2**12)
    for op in (ops.batched_eigh, ops.batched_svd):
        with pytest.raises(RuntimeError, match="out of memory") as caught:
            op(huge)
        assert is_out_of_memory(caught.value)
    assert torch.cuda.memory_allocated(cuda) < 2**30


def test_non_contiguous_inputs(cuda: torch.device) -> None:
    a = matrices(6, 20, 80, torch.float64).to(cuda)[::2, :, ::2]
    for view in (a, a.mT):
        for got, want in zip(ops.batched_svd(view), ops.batched_svd(view.contiguous()), strict=True):
            assert torch.equal(got, want)
