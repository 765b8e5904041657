"""The launcher csrc/cuda/linalg.cu on CPU tensors, over the mock cuSOLVER: layouts and checks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ops.cases import FULL, matrices, symmetric
from tests.ops.tolerance import assert_eigh
from unirank.errors import is_out_of_memory


@pytest.fixture
def launcher(mock) -> Iterator:
    mock.set_strict_memory(False)
    yield torch.ops.unirank_mock
    assert mock.violations() == []
    mock.set_strict_memory(True)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("N", [1, 31, 33, 64])
def test_launched_eigh(launcher, N: int, dtype: torch.dtype) -> None:
    a = symmetric(3, N, dtype)
    a_lower = a.tril() + torch.full_like(a, float("nan")).triu(1)
    assert_eigh(a, *launcher.batched_eigh(a_lower))


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 3), (3, 5), (33, 33), (40, 33), (33, 40), (100, 7), (7, 100)])
def test_launched_svd(launcher, M: int, N: int, layout: str) -> None:
    a, K = matrices(3, M, N, torch.float64), min(M, N)
    if layout == "columns":
        a = a.mT.contiguous().mT
    elif layout == "strided":
        a = matrices(6, M, 2 * N, torch.float64)[::2, :, ::2]
    before = a.clone()
    u, s, vh = launcher.batched_svd(a)
    assert (u.shape, s.shape, vh.shape) == ((3, M, K), (3, K), (3, K, N))
    assert u.is_contiguous()
    assert vh.is_contiguous()
    assert torch.equal(a, before)
    eye = torch.eye(K, dtype=torch.float64).expand(3, K, K)
    torch.testing.assert_close((u * s[:, None]) @ vh, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(a), rtol=1e-12, atol=1e-12)


def test_launched_without_enough_memory(launcher) -> None:
    # 2^60 bytes, more than any machine addresses; the words are those of torch's CPU allocator here.
    huge = torch.zeros(1, 1, 1, dtype=torch.float64).expand(2**57 // 2**14, 2**7, 2**7)
    for op in (launcher.batched_eigh, launcher.batched_svd):
        with pytest.raises(RuntimeError, match=f"{op.__name__}: .*DefaultCPUAllocator") as caught:
            op(huge)
        assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_launched_on_nothing(mock, launcher, shape: tuple[int, int, int]) -> None:
    B, M, N = shape
    K = min(M, N)
    u, s, vh = launcher.batched_svd(torch.zeros(shape))
    assert (u.shape, s.shape, vh.shape) == ((B, M, K), (B, K), (B, K, N))
    w, v = launcher.batched_eigh(torch.zeros(B, N, N)[:0])
    assert (w.shape, v.shape) == ((0, N), (0, N, N))
    assert mock.log() == []


def test_launched_with_bad_arguments(launcher) -> None:
    with pytest.raises(ValueError, match=r"a must have shape \[B, N, N\], got \[2, 3, 4\]"):
        launcher.batched_eigh(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="a must be float32 or float64, got float16"):
        launcher.batched_svd(torch.zeros(2, 3, 3).half())
    with pytest.raises(ValueError, match=r"a must have shape \[B, M, N\], got \[3, 4\]"):
        launcher.batched_svd(torch.zeros(3, 4))
