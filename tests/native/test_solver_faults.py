"""The cuSOLVER driver where something fails: matrices, calls, memory, handles. What it says, and that nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest
from solver_cases import DTYPES, close, columns, perturb_all, symmetric

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
# An SVD by its shape, and whether the polar method perturbs every matrix, so that Jacobi solves it again.
SVD = {
    (40, 33, False): ("cusolverDnXgesvdp", "cusolverDnXgesvdp_bufferSize", "cusolverDnCreateParams"),
    (40, 33, True): ("cusolverDn*gesvdj", "cusolverDn*gesvdj_bufferSize", "cusolverDnCreateGesvdjInfo"),
    (9, 4, False): (
        "cusolverDn*gesvdjBatched",
        "cusolverDn*gesvdjBatched_bufferSize",
        "cusolverDnCreateGesvdjInfo",
        "cudaMemcpy2DAsync",
    ),
}
SOLVE = {key: routines[0] for key, routines in SVD.items()}
EVERY_SVD_STEP = [(key, routine) for key, routines in SVD.items() for routine in (*routines, "cusolverDnSetStream")]


def svd(mock, key: tuple[int, int, bool], B: int = 3, bad: float | None = None) -> None:
    m, n, perturbed = key
    a = columns(B, m, n)
    if bad is not None:
        a[2, 1, 3] = bad
    if perturbed:
        perturb_all(mock)
    mock.svd(a)


# --- matrices that fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("info_on_nan", [0, 5])
def test_a_matrix_that_is_not_finite_is_named(mock, info_on_nan: int, bad: float) -> None:
    mock.set_info_on_nan(info_on_nan)
    a = symmetric(4, 9)
    a[2, 5, 3] = bad
    with pytest.raises(ValueError, match="batched_eigh: matrix 2 of the batch is not finite"):
        mock.eigh(a)
    for key in SVD:
        with pytest.raises(ValueError, match="batched_svd: matrix 2 of the batch is not finite"):
            svd(mock, key, 4, bad)


def test_eigh_that_does_not_converge_is_named(mock) -> None:
    mock.set_info("cusolverDnXsyevBatched", 3, 7)
    with pytest.raises(ValueError, match=r"did not converge on matrix 3 of the batch \(info 7\)"):
        mock.eigh(symmetric(5, 8))


@pytest.mark.parametrize("key", [key for key in SVD if key != (40, 33, False)], ids=str)
def test_svd_that_does_not_converge_is_named(mock, key) -> None:
    info = key[1] + 1
    mock.set_info(SOLVE[key], 1, info)
    with pytest.raises(ValueError, match=rf"did not converge on matrix 1 of the batch \(info {info}\)"):
        svd(mock, key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cause", ["perturbed", "not converged"])
def test_jacobi_repairs_what_the_polar_method_left(mock, cause: str, dtype) -> None:
    a = columns(4, 40, 33, dtype)
    if cause == "perturbed":
        mock.set_perturbation(1, 1.0)
        mock.set_perturbation(2, 1e-30)  # below rounding: stays
    else:
        mock.set_info("cusolverDnXgesvdp", 1, 34)
    left, s, right = mock.svd(a)
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
    mock.fail(routine, status)
    with pytest.raises(RuntimeError, match="batched_svd: " + error_text(routine, status)):
        svd(mock, key)


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
    mock.fail(routine, 7, 2)
    with pytest.raises(RuntimeError, match="failed on matrix 2 of the batch: CUSOLVER_STATUS_INTERNAL_ERROR"):
        svd(mock, key, 4)


def test_the_matrices_of_a_failed_batch_are_named(mock) -> None:
    mock.fail("cusolverDnXsyevBatched", 2)
    with pytest.raises(RuntimeError, match="failed on matrices 0 to 3 of the batch: CUSOLVER_STATUS_ALLOC_FAILED"):
        mock.eigh(symmetric(4, 5))


def test_a_workspace_reported_too_small_is_an_error(mock) -> None:
    mock.set_short_workspace("cusolverDnXsyevBatched")
    with pytest.raises(RuntimeError, match=r"cusolverDnXsyevBatched failed.*CUSOLVER_STATUS_INVALID_WORKSPACE"):
        mock.eigh(symmetric(3, 6))
    for key, routine in SOLVE.items():
        mock.set_short_workspace(routine)
        with pytest.raises(RuntimeError, match=routine.replace("*", "[*]") + ".*CUSOLVER_STATUS_INVALID_WORKSPACE"):
            svd(mock, key)


def test_every_allocation_can_fail(mock) -> None:
    for run in (lambda: mock.eigh(symmetric(3, 6)), *(lambda k=k: svd(mock, k) for k in SVD)):
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
