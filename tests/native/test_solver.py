"""The cuSOLVER driver of csrc/cuda against a mock cuSOLVER: results, layouts, which routine runs, chunks."""

from __future__ import annotations

import numpy as np
import pytest
from solver_cases import DTYPES, close, columns, perturb_all, symmetric

SMALL = [(1, 1), (5, 3), (32, 32), (32, 31)]
LARGE = [(33, 7), (33, 33), (64, 20), (200, 33)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("n", [*range(1, 10), 31, 32, 33, 64, 192])
def test_eigh(mock, n: int, B: int, dtype) -> None:
    a = symmetric(B, n, dtype)
    w, v = mock.eigh(a)
    assert w.dtype == v.dtype == dtype
    assert (np.diff(w) >= 0).all()
    close(w, np.linalg.eigvalsh(a))
    rows = v.astype(np.float64)  # row k is eigenvector k
    close(((rows.transpose(0, 2, 1) * w[:, None]) @ rows).astype(dtype), a)
    close((rows @ rows.transpose(0, 2, 1)).astype(dtype), np.broadcast_to(np.eye(n, dtype=dtype), v.shape))
    assert mock.violations() == []
    assert mock.log().count("cudaStreamSynchronize") == 2  # is all finite? what came out?


def test_eigh_reads_only_the_upper_triangle(mock) -> None:
    a = symmetric(2, 12)
    # In memory [column, row]: below the diagonal of the column-major matrix, row > column.
    dirty = np.where(np.triu(np.ones((12, 12), bool), 1), np.nan, a)
    for got, want in zip(mock.eigh(dirty), mock.eigh(a), strict=True):
        np.testing.assert_array_equal(got, want)


def assert_svd(mock, m: int, n: int, dtype, B: int, synchronisations: int = 2) -> None:
    a = columns(B, m, n, dtype)
    left, s, right = mock.svd(a)
    assert s.dtype == dtype
    assert (np.diff(s) <= 0).all()
    assert (s >= 0).all()
    close(s, np.linalg.svd(a, compute_uv=False))
    left, right = left.astype(np.float64), right.astype(np.float64)
    close((right.transpose(0, 2, 1) * s[:, None] @ left).astype(dtype), a)
    eye = np.broadcast_to(np.eye(n, dtype=dtype), right.shape)
    close((left @ left.transpose(0, 2, 1)).astype(dtype), eye)
    close((right @ right.transpose(0, 2, 1)).astype(dtype), eye)
    assert mock.violations() == []
    assert mock.log().count("cudaStreamSynchronize") == synchronisations
    assert not [call for call in mock.log() if call.endswith("gesvdj")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [*SMALL, *LARGE])
def test_svd(mock, m: int, n: int, dtype) -> None:
    assert_svd(mock, m, n, dtype, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), LARGE)
def test_svd_of_which_qr_iteration_repairs_every_matrix(mock, m: int, n: int, dtype) -> None:
    perturb_all(mock)
    assert_svd(mock, m, n, dtype, 3, synchronisations=3)
    assert mock.log().count("cusolverDnXgesvd") == 3
    assert mock.log().count("turn_square") == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SMALL)
def test_small_svd_of_which_qr_iteration_repairs_one(mock, m: int, n: int, dtype) -> None:
    mock.set_info("cusolverDn*gesvdjBatched", 1, n + 1)
    assert_svd(mock, m, n, dtype, 3, synchronisations=3)
    assert mock.log().count("cusolverDnXgesvd") == 1


@pytest.mark.parametrize("n", range(1, 65))
def test_svd_of_every_small_order(mock, n: int) -> None:
    assert_svd(mock, n, n, np.float64, 2)
    mock.reset()
    assert_svd(mock, n + 3, n, np.float32, 2)


@pytest.mark.parametrize(("m", "n"), [(576, 192), (576, 576)])
def test_svd_of_real_shapes(mock, m: int, n: int) -> None:
    assert_svd(mock, m, n, np.float32, 1)


def test_eigh_of_a_real_shape(mock) -> None:
    a = symmetric(1, 576)
    close(mock.eigh(a)[0], np.linalg.eigvalsh(a))


@pytest.mark.parametrize(
    ("m", "n", "routine"),
    [
        (32, 32, "cusolverDn*gesvdjBatched"),
        (32, 1, "cusolverDn*gesvdjBatched"),
        (33, 32, "cusolverDnXgesvdp"),
        (330, 3, "cusolverDnXgesvdp"),
        (33, 33, "cusolverDnXgesvdp"),
    ],
)
def test_the_rule_that_picks_a_routine(mock, m: int, n: int, routine: str) -> None:
    mock.svd(columns(2, m, n))
    solves = [c for c in mock.log() if "ges" in c and not c.endswith("_bufferSize") and "Info" not in c]
    batched = "Batched" in routine
    assert solves == [routine] * (1 if batched else 2)


def test_large_batches_go_in_chunks(mock) -> None:
    B = 16384 + 3
    a = symmetric(B, 2, np.float32)
    w, _ = mock.eigh(a)
    close(w, np.linalg.eigvalsh(a))
    assert mock.log().count("cusolverDnXsyevBatched") == 2
    mock.reset()
    _, s, _ = mock.svd(a)
    close(s, np.linalg.svd(a, compute_uv=False))
    assert mock.log().count("cusolverDn*gesvdjBatched") == 2
    assert mock.violations() == []
