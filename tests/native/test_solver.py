"""The cuSOLVER driver and launcher of csrc/cuda against a mock cuSOLVER: layouts, workspaces, errors, leaks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "mock"), str(HERE.parent / "ops")]
pytest.importorskip("pybind11")

from tolerance import FULL, assert_as_good_as_torch  # noqa: E402

import build  # noqa: E402

DTYPES = (np.float32, np.float64)
DRIVERS = ("auto", "gesdd", "gesvd", "gesvdj", "gesvda")
SHAPES = [(1, 1), (5, 3), (32, 32), (32, 31), (33, 7), (33, 33), (64, 20), (200, 33)]
STATUSES = {
    1: "NOT_INITIALIZED",
    2: "ALLOC_FAILED",
    3: "INVALID_VALUE",
    4: "ARCH_MISMATCH",
    5: "MAPPING_ERROR",
    6: "EXECUTION_FAILED",
    7: "INTERNAL_ERROR",
    8: "MATRIX_TYPE_NOT_SUPPORTED",
    9: "NOT_SUPPORTED",
    31: "INVALID_WORKSPACE",
}
# What one call of each kind goes through, in order: (routine, whether cuSOLVER's statuses apply).
EIGH = ("cusolverDnXsyevBatched", "cusolverDnXsyevBatched_bufferSize", "cusolverDnCreateParams")
SVD = {
    ("auto", 40, 33): ("cusolverDnXgesvdp", "cusolverDnXgesvdp_bufferSize", "cusolverDnCreateParams"),
    ("gesvd", 40, 33): ("cusolverDnXgesvd", "cusolverDnXgesvd_bufferSize", "cusolverDnCreateParams"),
    ("gesvdj", 40, 33): ("cusolverDn*gesvdj", "cusolverDn*gesvdj_bufferSize", "cusolverDnCreateGesvdjInfo"),
    ("auto", 9, 4): (
        "cusolverDn*gesvdjBatched",
        "cusolverDn*gesvdjBatched_bufferSize",
        "cusolverDnCreateGesvdjInfo",
        "cudaMemcpy2DAsync",
    ),
    ("gesvda", 40, 7): ("cusolverDn*gesvdaStridedBatched", "cusolverDn*gesvdaStridedBatched_bufferSize"),
}
SOLVE = {key: routines[0] for key, routines in SVD.items()}
EVERY_SVD_STEP = [(key, routine) for key, routines in SVD.items() for routine in (*routines, "cusolverDnSetStream")]


@pytest.fixture(scope="module")
def loaded():
    return build.load()


@pytest.fixture
def mock(loaded) -> Iterator:
    """The mock, clean before; after the test nothing may be left but this thread's handles.

    Those are two at most: the driver's tests run on device 0, and the launcher's on -1, the index of CPU tensors.
    """
    loaded.reset()
    yield loaded
    assert {kind: count for kind, count in loaded.live().items() if count and kind != "handle"} == {}
    assert loaded.live().get("handle", 0) <= 2
    loaded.reset()


def columns(B: int, m: int, n: int, dtype=np.float64) -> np.ndarray:
    """Column-major matrices as they lie in memory: [B, n, m]."""
    return np.random.default_rng(m * 1000 + n).standard_normal((B, n, m)).astype(dtype)


def symmetric(B: int, n: int, dtype=np.float64) -> np.ndarray:
    a = columns(B, n, n)
    return (a + a.transpose(0, 2, 1)).astype(dtype)


def close(got: np.ndarray, want: np.ndarray) -> None:
    eps = np.finfo(got.dtype).eps
    assert np.abs(got - want).max() <= 100 * eps * max(1.0, float(np.abs(want).max()))


# --- results -----------------------------------------------------------------------------------------------------


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
    assert mock.log().count("cudaStreamSynchronize") == 1


def test_eigh_reads_only_the_upper_triangle(mock) -> None:
    a = symmetric(2, 12)
    # In memory [column, row]: below the diagonal of the column-major matrix, row > column.
    dirty = np.where(np.triu(np.ones((12, 12), bool), 1), np.nan, a)
    for got, want in zip(mock.eigh(dirty), mock.eigh(a), strict=True):
        np.testing.assert_array_equal(got, want)


def assert_svd(mock, m: int, n: int, driver: str, dtype, B: int) -> None:
    a = columns(B, m, n, dtype)
    left, s, right, transposed = mock.svd(a, driver)
    assert s.dtype == dtype
    assert (np.diff(s) <= 0).all()
    assert (s >= 0).all()
    close(s, np.linalg.svd(a, compute_uv=False))
    left, right = left.astype(np.float64), right.astype(np.float64)
    if transposed:
        right = right.transpose(0, 2, 1)
    close((right.transpose(0, 2, 1) * s[:, None] @ left).astype(dtype), a)
    eye = np.broadcast_to(np.eye(n, dtype=dtype), right.shape)
    close((left @ left.transpose(0, 2, 1)).astype(dtype), eye)
    close((right @ right.transpose(0, 2, 1)).astype(dtype), eye)
    assert mock.violations() == []
    assert mock.log().count("cudaStreamSynchronize") == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_svd(mock, m: int, n: int, driver: str, dtype) -> None:
    assert_svd(mock, m, n, driver, dtype, 3)


@pytest.mark.parametrize("n", range(1, 65))
def test_svd_of_every_small_order(mock, n: int) -> None:
    assert_svd(mock, n, n, "auto", np.float64, 2)
    mock.reset()
    assert_svd(mock, n + 3, n, "auto", np.float32, 2)


@pytest.mark.parametrize(("m", "n"), [(576, 192), (576, 576)])
def test_svd_of_real_shapes(mock, m: int, n: int) -> None:
    assert_svd(mock, m, n, "auto", np.float32, 1)


def test_eigh_of_a_real_shape(mock) -> None:
    a = symmetric(1, 576)
    close(mock.eigh(a)[0], np.linalg.eigvalsh(a))


@pytest.mark.parametrize(
    ("driver", "m", "n", "routine"),
    [
        ("auto", 32, 32, "cusolverDn*gesvdjBatched"),
        ("gesdd", 32, 1, "cusolverDn*gesvdjBatched"),
        ("gesvdj", 32, 32, "cusolverDn*gesvdjBatched"),
        ("auto", 33, 32, "cusolverDnXgesvdp"),
        ("auto", 330, 3, "cusolverDnXgesvdp"),
        ("gesdd", 33, 33, "cusolverDnXgesvdp"),
        ("gesvdj", 33, 3, "cusolverDn*gesvdj"),
        ("gesvd", 3, 3, "cusolverDnXgesvd"),
        ("gesvda", 3, 3, "cusolverDn*gesvdaStridedBatched"),
    ],
)
def test_the_rule_that_picks_a_routine(mock, driver: str, m: int, n: int, routine: str) -> None:
    mock.svd(columns(2, m, n), driver)
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
    _, s, _, _ = mock.svd(a)
    close(s, np.linalg.svd(a, compute_uv=False))
    assert mock.log().count("cusolverDn*gesvdjBatched") == 2
    assert mock.violations() == []


# --- matrices that fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("info_on_nan", [0, 5])
def test_a_matrix_that_is_not_finite_is_named(mock, info_on_nan: int, bad: float) -> None:
    mock.set_info_on_nan(info_on_nan)
    a = symmetric(4, 9)
    a[2, 5, 3] = bad
    with pytest.raises(ValueError, match="batched_eigh: matrix 2 of the batch is not finite"):
        mock.eigh(a)
    for driver, m, n in SVD:
        x = columns(4, m, n)
        x[2, 1, 3] = bad
        with pytest.raises(ValueError, match="batched_svd: matrix 2 of the batch is not finite"):
            mock.svd(x, driver)


def test_eigh_that_does_not_converge_is_named(mock) -> None:
    mock.set_info("cusolverDnXsyevBatched", 3, 7)
    with pytest.raises(ValueError, match=r"did not converge on matrix 3 of the batch \(info 7\)"):
        mock.eigh(symmetric(5, 8))


@pytest.mark.parametrize("key", [key for key in SVD if key != ("auto", 40, 33)], ids=str)
def test_svd_that_does_not_converge_is_named(mock, key) -> None:
    driver, m, n = key
    mock.set_info(SOLVE[key], 1, n + 1)
    with pytest.raises(ValueError, match=rf"did not converge on matrix 1 of the batch \(info {n + 1}\)"):
        mock.svd(columns(3, m, n), driver)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cause", ["perturbed", "not converged"])
def test_jacobi_repairs_what_the_polar_method_left(mock, cause: str, dtype) -> None:
    a = columns(4, 40, 33, dtype)
    if cause == "perturbed":
        mock.set_perturbation(1, 1.0)
        mock.set_perturbation(2, 1e-30)  # below rounding: stays
    else:
        mock.set_info("cusolverDnXgesvdp", 1, 34)
    left, s, right, transposed = mock.svd(a)
    assert not transposed
    close((right.transpose(0, 2, 1) * s[:, None] @ left).astype(dtype), a)
    assert mock.log().count("cusolverDn*gesvdj") == 1
    assert mock.log().count("cudaStreamSynchronize") == 2
    assert mock.violations() == []


def test_a_repair_that_fails_is_named(mock) -> None:
    mock.set_info("cusolverDnXgesvdp", 2, 34)
    mock.set_info("cusolverDn*gesvdj", 0, 35)
    with pytest.raises(ValueError, match=r"did not converge on matrix 2 of the batch \(info 35\)"):
        mock.svd(columns(3, 40, 33))


# --- calls that fail ----------------------------------------------------------------------------------------------


def error_text(routine: str, status: int) -> str:
    kind = "mock CUDA error" if routine.startswith("cuda") else rf"CUSOLVER_STATUS_{STATUSES[status]} \({status}\)"
    return rf"{routine.replace('*', '[*]')} failed.*: {kind}"


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("routine", [*EIGH, "cusolverDnSetStream", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_every_eigh_call_can_fail_with_every_status(mock, routine: str, status: int) -> None:
    mock.fail(routine, status)
    with pytest.raises(RuntimeError, match="batched_eigh: " + error_text(routine, status)):
        mock.eigh(symmetric(3, 6))


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize(("key", "routine"), EVERY_SVD_STEP, ids=str)
def test_every_svd_call_can_fail_with_every_status(mock, key, routine: str, status: int) -> None:
    driver, m, n = key
    mock.fail(routine, status)
    with pytest.raises(RuntimeError, match="batched_svd: " + error_text(routine, status)):
        mock.svd(columns(3, m, n), driver)


@pytest.mark.parametrize("copies", range(6))
def test_every_copy_can_fail(mock, copies: int) -> None:
    mock.fail("cudaMemcpyAsync", 1, copies)
    a = columns(3, 40, 33)
    if copies < 5:  # three inputs, info, values
        with pytest.raises(RuntimeError, match="cudaMemcpyAsync failed"):
            mock.svd(a)
    else:
        mock.svd(a)


@pytest.mark.parametrize(("key", "routine"), [(k, r) for k, r in SOLVE.items() if "X" in r or r.endswith("gesvdj")])
def test_the_matrix_of_a_failed_call_is_named(mock, key, routine: str) -> None:
    driver, m, n = key
    mock.fail(routine, 7, 2)
    with pytest.raises(RuntimeError, match="failed on matrix 2 of the batch: CUSOLVER_STATUS_INTERNAL_ERROR"):
        mock.svd(columns(4, m, n), driver)


def test_the_matrices_of_a_failed_batch_are_named(mock) -> None:
    mock.fail("cusolverDnXsyevBatched", 2)
    with pytest.raises(RuntimeError, match="failed on matrices 0 to 3 of the batch: CUSOLVER_STATUS_ALLOC_FAILED"):
        mock.eigh(symmetric(4, 5))


def test_a_workspace_reported_too_small_is_an_error(mock) -> None:
    mock.set_short_workspace("cusolverDnXsyevBatched")
    with pytest.raises(RuntimeError, match=r"cusolverDnXsyevBatched failed.*CUSOLVER_STATUS_INVALID_WORKSPACE"):
        mock.eigh(symmetric(3, 6))
    for (driver, m, n), routine in SOLVE.items():
        mock.set_short_workspace(routine)
        with pytest.raises(RuntimeError, match="CUSOLVER_STATUS_INVALID_WORKSPACE"):
            mock.svd(columns(3, m, n), driver)


def test_every_allocation_can_fail(mock) -> None:
    for run in (lambda: mock.eigh(symmetric(3, 6)), *(lambda k=k: mock.svd(columns(3, *k[1:]), k[0]) for k in SVD)):
        for succeed in range(10):
            mock.set_allocations_that_succeed(succeed)
            try:
                run()
            except RuntimeError as error:
                assert "memory for cuSOLVER's workspace" in str(error)  # noqa: PT017 (the loop ends where it succeeds)
            else:
                assert succeed > 0
                break
            finally:
                mock.set_allocations_that_succeed(-1)
        else:
            pytest.fail("never enough memory")


def test_unknown_driver(mock) -> None:
    with pytest.raises(ValueError, match="driver must be auto or gesdd or gesvd or gesvdj or gesvda on cuda, got qr"):
        mock.svd(columns(1, 3, 3), "qr")
    assert mock.log() == []


# --- handles ------------------------------------------------------------------------------------------------------


def test_a_thread_owns_one_handle_per_device_and_takes_it_along(mock) -> None:
    def work() -> None:
        for device in (0, 1, 0):
            mock.eigh(symmetric(2, 4), device)
            mock.svd(columns(2, 40, 33))

    before = mock.live().get("handle", 0)
    mock.on_a_thread(work)
    assert mock.created()["handle"] == 2
    assert mock.live().get("handle", 0) == before
    assert mock.violations() == []


def test_a_handle_that_cannot_be_made_is_an_error_and_is_tried_again(mock) -> None:
    messages = []

    def work() -> None:
        mock.fail("cusolverDnCreate", 1)
        try:
            mock.eigh(symmetric(1, 3))
        except RuntimeError as error:
            messages.append(str(error))
        mock.reset()
        mock.eigh(symmetric(1, 3))

    mock.on_a_thread(work)
    assert messages == ["batched_eigh: cusolverDnCreate failed: CUSOLVER_STATUS_NOT_INITIALIZED (1)"]
    assert mock.created()["handle"] == 1


def test_a_runtime_that_is_unloading_is_left_alone(mock) -> None:
    def work() -> None:
        mock.eigh(symmetric(1, 3))
        mock.fail("cudaGetDevice", 4)

    before = mock.live().get("handle", 0)
    mock.on_a_thread(work)
    assert "cusolverDnDestroy" not in mock.log()
    assert mock.live()["handle"] == before + 1
    mock.forget_handle()


# --- the launcher, on CPU tensors ---------------------------------------------------------------------------------


@pytest.fixture
def launcher(mock) -> Iterator:
    mock.set_strict_memory(False)
    yield torch.ops.unirank_mock
    assert mock.violations() == []
    mock.set_strict_memory(True)


def batch(B: int, M: int, N: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(B, M, N, generator=torch.Generator().manual_seed(M * 1000 + N), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("N", [1, 31, 33, 64])
def test_launched_eigh(launcher, N: int, dtype: torch.dtype) -> None:
    a = batch(3, N, N, torch.float64)
    a = (a + a.mT).to(dtype)
    a_lower = a.tril() + torch.full_like(a, float("nan")).triu(1)
    w, v = launcher.batched_eigh(a_lower)
    assert v.is_contiguous()
    plain_w, plain_v = torch.linalg.eigh(a)
    assert_as_good_as_torch(w, plain_w, torch.linalg.eigvalsh(a.double()))
    rebuilt = v.double() @ torch.diag_embed(w.double()) @ v.double().mT
    plain = plain_v.double() @ torch.diag_embed(plain_w.double()) @ plain_v.double().mT
    assert_as_good_as_torch(rebuilt.to(dtype), plain.to(dtype), a)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (5, 3), (3, 5), (33, 33), (40, 33), (33, 40), (100, 7), (7, 100)])
def test_launched_svd(launcher, M: int, N: int, driver: str, layout: str) -> None:
    a, K = batch(3, M, N, torch.float64), min(M, N)
    if layout == "columns":
        a = a.mT.contiguous().mT
    elif layout == "strided":
        a = batch(6, M, 2 * N, torch.float64)[::2, :, ::2]
    before = a.clone()
    u, s, vh = launcher.batched_svd(a, driver)
    assert (u.shape, s.shape, vh.shape) == ((3, M, K), (3, K), (3, K, N))
    assert u.is_contiguous()
    assert vh.is_contiguous()
    assert torch.equal(a, before)
    eye = torch.eye(K, dtype=torch.float64).expand(3, K, K)
    torch.testing.assert_close((u * s[:, None]) @ vh, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(vh @ vh.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(s, torch.linalg.svdvals(a), rtol=1e-12, atol=1e-12)


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
    with pytest.raises(ValueError, match="driver must be"):
        launcher.batched_svd(torch.zeros(0, 3, 4), "jacobi")
