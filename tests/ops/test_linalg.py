import pytest
import torch
from torch import Tensor

from tests.ops.cases import FULL, SCHEMA_CHECKS, SIZES, matrices, symmetric
from tests.ops.tolerance import assert_eigh, assert_same_bits_for_any_thread_count, assert_svd
from unirank import ops, reference

SHAPES = [(1, 1), (1, 33), (33, 1), (31, 33), (33, 31), (255, 32), (32, 257), (64, 64)]


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("B", [0, 1, 3])
@pytest.mark.parametrize("N", SIZES)
def test_eigh_is_as_good_as_torch(N: int, B: int, dtype: torch.dtype) -> None:
    a = symmetric(B, N, dtype)
    for op in (ops.batched_eigh, reference.batched_eigh):
        assert_eigh(a, *op(a))


def test_eigh_reads_only_the_lower_half() -> None:
    a = symmetric(2, 33, torch.float64)
    dirty = a.tril() + torch.full_like(a, float("nan")).triu(1)
    for got, want in zip(ops.batched_eigh(dirty), ops.batched_eigh(a), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize(("M", "N"), SHAPES)
def test_svd_is_as_good_as_torch(M: int, N: int, dtype: torch.dtype) -> None:
    a = matrices(3, M, N, dtype)
    plain = torch.linalg.svd(a, full_matrices=False)
    for op in (ops.batched_svd, reference.batched_svd):
        assert_svd(a, op(a), plain)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_svd_of_nothing(shape: tuple[int, int, int]) -> None:
    B, M, N = shape
    for op in (ops.batched_svd, reference.batched_svd):
        u, s, vh = op(torch.zeros(shape))
        assert (u.shape, s.shape, vh.shape) == ((B, M, 0), (B, 0), (B, 0, N)) if min(M, N) == 0 else True


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_hard_matrices(scale: float) -> None:
    spectrum = torch.logspace(0, -12, 40, dtype=torch.float64)
    q = torch.linalg.qr(matrices(1, 40, 40, torch.float64)[0]).Q
    a = ((q * spectrum) @ q.T * scale)[None]
    w, _ = ops.batched_eigh(a)
    _, s, _ = ops.batched_svd(a)
    torch.testing.assert_close(w[0].flip(0) / scale, spectrum, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(s[0] / scale, spectrum, rtol=1e-13, atol=1e-14)
    zero = torch.zeros(1, 9, 9)
    assert torch.equal(ops.batched_svd(zero)[1], torch.zeros(1, 9))
    assert torch.equal(ops.batched_eigh(zero)[0], torch.zeros(1, 9))


def test_non_contiguous_inputs() -> None:
    a = symmetric(4, 33, torch.float32)
    assert torch.equal(ops.batched_eigh(a[::2])[1], ops.batched_eigh(a[::2].contiguous())[1])
    b = matrices(2, 20, 33, torch.float32).mT
    assert torch.equal(ops.batched_svd(b)[2], ops.batched_svd(b.contiguous())[2])


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("N", [7, 33, 200, 400])
def test_bits_do_not_depend_on_threads(N: int, B: int, dtype: torch.dtype) -> None:
    a = symmetric(B, N, dtype)
    assert_same_bits_for_any_thread_count(lambda: ops.batched_eigh(a))
    assert_same_bits_for_any_thread_count(lambda: ops.batched_svd(a[:, :, : N - 3]))


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("N", [7, 33, 257])
def test_bits_do_not_depend_on_the_batch(N: int, dtype: torch.dtype) -> None:
    a = symmetric(5, N, dtype)
    for op in (ops.batched_eigh, ops.batched_svd):
        together = op(a)
        for b in range(5):
            for one, all_ in zip(op(a[b : b + 1]), together, strict=True):
                assert torch.equal(one[0], all_[b])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("module", [ops, reference])
def test_a_bad_matrix_is_named(module, bad: float) -> None:
    a = symmetric(4, 9, torch.float32)
    a[2, 5, 3] = bad
    for op in (module.batched_eigh, module.batched_svd):
        with pytest.raises(ValueError, match="matrix 2 of the batch is not finite"):
            op(a)


@pytest.mark.parametrize("module", [ops, reference])
def test_bad_arguments(module) -> None:
    with pytest.raises(ValueError, match=r"a must have shape \[B, N, N\], got \[2, 3, 4\]"):
        module.batched_eigh(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="a must be float32 or float64, got"):
        module.batched_eigh(torch.zeros(2, 3, 3).half())
    with pytest.raises(ValueError, match=r"a must have shape \[B, M, N\], got \[3, 4\]"):
        module.batched_svd(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="a must be float32 or float64, got"):
        module.batched_svd(torch.zeros(2, 3, 4).int())


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (1, 1, 1), (2, 5, 5)])
def test_opcheck(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a = symmetric(shape[0], shape[1], dtype)
    torch.library.opcheck(torch.ops.unirank.batched_eigh, (a,), test_utils=SCHEMA_CHECKS)
    torch.library.opcheck(torch.ops.unirank.batched_svd, (a,), test_utils=SCHEMA_CHECKS)
    torch.library.opcheck(torch.ops.unirank.batched_svd, (a[:, :, 1:],), test_utils=SCHEMA_CHECKS)


def test_compiles_into_one_graph() -> None:
    def both(a: Tensor) -> Tensor:
        w, v = ops.batched_eigh(a)
        u, s, vh = ops.batched_svd(a)
        return v * w[:, None] @ v.mT - u * s[:, None] @ vh

    a = symmetric(2, 9, torch.float64)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="aot_eager")(a), both(a))
