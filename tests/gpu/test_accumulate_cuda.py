"""cosine_accumulate_ and gram_accumulate_ on the GPU: the cases of tests/ops, against the CPU ops and fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.ops.cases import FLOATING, FULL, SIZES, activations, run_cosine, run_gram
from tests.ops.tolerance import assert_moments_on_gpu, assert_same_cosine_sums
from unirank import ops, reference

REAL = (576, 1536)


cosine = partial(run_cosine, ops.cosine_accumulate_)
gram = partial(run_gram, ops.gram_accumulate_)


def assert_same_cosine(x: Tensor, y: Tensor, device: torch.device) -> None:
    assert_same_cosine_sums(cosine(x.to(device), y.to(device)), cosine(x, y))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D", [*SIZES, *REAL])
@pytest.mark.parametrize("T", SIZES)
def test_cosine(cuda: torch.device, T: int, D: int, dtype: torch.dtype) -> None:
    assert_same_cosine(activations(T, D, dtype), activations(T, D, dtype, 1), cuda)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("D", REAL)
def test_cosine_of_real_shapes(cuda: torch.device, D: int, dtype: torch.dtype) -> None:
    assert_same_cosine(activations(300, D, dtype), activations(300, D, dtype, 1), cuda)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_cosine_of_zero_and_non_finite_rows(cuda: torch.device, dtype: torch.dtype, bad: float) -> None:
    x, y = activations(40, 64, dtype), activations(40, 64, dtype, 1)
    x[7] = bad
    assert_same_cosine(x, y, cuda)


@pytest.mark.parametrize("dtype", FLOATING)
def test_cosine_of_rows_that_no_vector_load_may_touch(cuda: torch.device, dtype: torch.dtype) -> None:
    wide = activations(50, 131, dtype).to(cuda)
    x, y = wide[:, 1:66], wide[:, 66:131]
    torch.testing.assert_close(cosine(x, y), cosine(x.contiguous(), y.contiguous()), rtol=1e-12, atol=1e-11)


def test_cosine_bits_repeat(cuda: torch.device) -> None:
    x, y = (activations(3000, 576, torch.bfloat16, seed).to(cuda) for seed in (0, 1))
    assert torch.equal(cosine(x, y), cosine(x, y))


def assert_gram(x: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    assert_moments_on_gpu(*gram(x.to(device), dtype), x)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("T", SIZES)
def test_gram(cuda: torch.device, T: int, N: int, dtype: torch.dtype) -> None:
    assert_gram(activations(T, N, dtype), torch.float64, cuda)


@pytest.mark.parametrize("gram_dtype", FULL)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("N", REAL)
def test_gram_of_real_shapes(cuda: torch.device, N: int, dtype: torch.dtype, gram_dtype: torch.dtype) -> None:
    assert_gram(activations(300, N, dtype), gram_dtype, cuda)


@pytest.mark.parametrize("T", [8191, 8192, 8193, 20000])
def test_gram_of_more_rows_than_a_chunk(cuda: torch.device, T: int) -> None:
    assert_gram(activations(T, 33, torch.float32), torch.float64, cuda)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("T", "N"), [(20000, 65), (1, 4100), (300, 4100)])
def test_gram_of_small_integers_is_exact(cuda: torch.device, T: int, N: int, dtype: torch.dtype) -> None:
    # No sum rounds, in whatever order, so no token, chunk or panel can be lost within a tolerance.
    x = torch.randint(-2, 3, (T, N), generator=torch.Generator().manual_seed(T)).to(dtype)
    got, mean = gram(x.to(cuda), torch.float64)
    assert torch.equal(got, x.double().T @ x.double())
    assert torch.equal(mean, x.double().sum(0))


@pytest.mark.parametrize("stride", [0, 1, 63, 2**40])
def test_gram_of_one_row_whose_stride_says_nothing(cuda: torch.device, stride: int) -> None:
    x = activations(64, 64, torch.float32)
    view = x.to(cuda).as_strided((1, 64), (stride, 1))
    assert view.stride() == (stride, 1)
    assert torch.equal(gram(view)[0], gram(x[:1].to(cuda))[0])


def test_tf32_is_never_used(cuda: torch.device) -> None:
    x = activations(2048, 256, torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert_gram(x, torch.float64, cuda)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_another_stream_is_respected(cuda: torch.device) -> None:
    x = activations(4096, 576, torch.float32).to(cuda)
    want = gram(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        got = gram(x)
    torch.cuda.synchronize()
    assert torch.equal(got[0], want[0])


def test_mixed_devices_are_refused(cuda: torch.device) -> None:
    x = activations(4, 5, torch.float32)
    for op in (ops.cosine_accumulate_, reference.cosine_accumulate_):
        with pytest.raises(ValueError, match="cuda"):
            op(torch.zeros(3, dtype=torch.float64, device=cuda), x.to(cuda), x)
