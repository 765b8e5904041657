"""The cuSOLVER driver where something fails: matrices, calls, memory, handles. What it says, and that nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest
from solver_cases import DTYPES, close, columns, perturb_all, symmetric

from unirank.errors import is_out_of_memory

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
EXECUTION_FAILED = 6
OUT_OF_MEMORY = 2  # cuSOLVER's status, cuBLAS's is 3; and the runtime's error
KERNELS = ("find_not_finite", "turn_square")
# What one call of each kind goes through, in order: (routine, whether cuSOLVER's statuses apply).
EIGH = ("cusolverDnXsyevBatched", "cusolverDnXsyevBatched_bufferSize", "cusolverDnCreateParams")
# An SVD by its shape, and whether the polar method perturbs every matrix, so that QR iteration solves it again.
SVD = {
    (40, 33, False): ("cusolverDnXgesvdp", "cusolverDnXgesvdp_bufferSize", "cusolverDnCreateParams"),
    (40, 33, True): ("cusolverDnXgesvd", "cusolverDnXgesvd_bufferSize", "turn_square"),
    (9, 4, False): (
        "cusolverDn*gesvdjBatched",
        "cusolverDn*gesvdjBatched_bufferSize",
        "cusolverDnCreateGesvdjInfo",
        "cudaMemcpy2DAsync",
    ),
}
SOLVE = {key: routines[0] for key, routines in SVD.items()}
EVERY = ("cusolverDnSetStream", "find_not_finite", "cudaMemsetAsync", "cudaMemcpyAsync", "cudaStreamSynchronize")
EVERY_SVD_STEP = [(key, routine) for key, routines in SVD.items() for routine in (*routines, *EVERY)]


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
def test_a_matrix_that_is_not_finite_is_named_before_cusolver_gets_it(mock, bad: float) -> None:
    a = symmetric(4, 9)
    a[2, 5, 3] = bad
    with pytest.raises(ValueError, match="batched_eigh: matrix 2 of the batch is not finite"):
        mock.eigh(a)
    for key in SVD:
        with pytest.raises(ValueError, match="batched_svd: matrix 2 of the batch is not finite"):
            svd(mock, key, 4, bad)
    assert not [call for call in mock.log() if call in (*SOLVE.values(), EIGH[0])]


@pytest.mark.parametrize("info", [0, 5])
@pytest.mark.parametrize("status", [0, EXECUTION_FAILED])
def test_a_matrix_that_became_not_finite_after_the_scan_is_named(mock, status: int, info: int) -> None:
    # Real solvers answer such a matrix in each of these ways, by routine and version.
    mock.set_answer_to_nan(status, info)
    a = symmetric(4, 9)
    a[2, 5, 3] = np.nan
    mock.set_scans_that_miss(1)
    with pytest.raises(ValueError, match="batched_eigh: matrix 2 of the batch is not finite"):
        mock.eigh(a)
    for key in SVD:
        mock.set_scans_that_miss(1)
        with pytest.raises(ValueError, match="batched_svd: matrix 2 of the batch is not finite"):
            svd(mock, key, 4, np.nan)


@pytest.mark.parametrize("info", [0, 7])
def test_execution_failed_on_finite_matrices_is_told_as_what_it_is(mock, info: int) -> None:
    # A batch whose solver fails: which matrix it was, where info says so, else the matrices that went in together.
    where = "on matrix 3 of the batch" if info else "on matrices 0 to 4 of the batch"
    mock.set_scans_that_miss(2)
    mock.set_answer_to_nan(EXECUTION_FAILED, info)
    a = symmetric(5, 8)
    a[3, 2, 2] = np.nan  # for the mock's EXECUTION_FAILED, while the driver is made to believe that it is finite
    status = r"CUSOLVER_STATUS_EXECUTION_FAILED \(6\)"
    with pytest.raises(RuntimeError, match=f"failed {where}: {status}, info {info}; all values are finite"):
        mock.eigh(a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decomposition_that_overflows_is_named(mock, dtype) -> None:
    a = symmetric(3, 40, dtype)
    a[1] = np.finfo(dtype).max
    with pytest.raises(ValueError, match=f"matrix 1 of the batch is finite, but .* overflows {np.dtype(dtype)}"):
        mock.eigh(a)


def test_eigh_that_does_not_converge_is_named(mock) -> None:
    mock.set_info("cusolverDnXsyevBatched", 3, 7)
    with pytest.raises(ValueError, match=r"did not converge on matrix 3 of the batch \(info 7\)"):
        mock.eigh(symmetric(5, 8))


@pytest.mark.parametrize("key", SVD, ids=str)
def test_svd_that_does_not_converge_is_named(mock, key) -> None:
    # Whichever method was first, QR iteration is the last.
    info = key[1] + 1
    mock.set_info(SOLVE[key], 1, info)
    mock.set_info("cusolverDnXgesvd", 1 if key[2] else 0, info)
    with pytest.raises(ValueError, match=rf"did not converge on matrix 1 of the batch \(info {info}\)"):
        svd(mock, key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cause", ["perturbed", "not converged"])
def test_qr_iteration_repairs_what_the_polar_method_left(mock, cause: str, dtype) -> None:
    a = columns(4, 40, 33, dtype)
    if cause == "perturbed":
        mock.set_perturbation(1, 1.0)
        mock.set_perturbation(2, 1e-30)  # below rounding: stays
    else:
        mock.set_info("cusolverDnXgesvdp", 1, 34)
    left, s, right = mock.svd(a)
    close((right.transpose(0, 2, 1) * s[:, None] @ left).astype(dtype), a)
    assert mock.log().count("cusolverDnXgesvd") == 1
    assert mock.log().count("cudaStreamSynchronize") == 3
    assert mock.violations() == []


def test_a_repair_that_fails_is_named(mock) -> None:
    mock.set_info("cusolverDnXgesvdp", 2, 34)
    mock.set_info("cusolverDnXgesvd", 0, 35)
    with pytest.raises(ValueError, match=r"did not converge on matrix 2 of the batch \(info 35\)"):
        mock.svd(columns(3, 40, 33))


# --- calls that fail ----------------------------------------------------------------------------------------------


def error_text(routine: str, status: int) -> str:
    if routine.startswith("cuda") or routine in KERNELS:
        kind = "CUDA out of memory" if status == OUT_OF_MEMORY else "mock CUDA error"
        return f"{routine} failed: {kind}"
    kind = rf"CUSOLVER_STATUS_{STATUSES[status]} \({status}\)"
    return rf"{routine.replace('*', '[*]')} failed.*: {kind}{', CUDA out of memory' if status == OUT_OF_MEMORY else ''}"


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("routine", [*EIGH, *EVERY])
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


@pytest.mark.parametrize("copies", range(7))
def test_every_copy_can_fail(mock, copies: int) -> None:
    mock.fail("cudaMemcpyAsync", 1, copies)
    a = columns(3, 40, 33)
    if copies < 6:  # what the scan found, three inputs, info, values
        with pytest.raises(RuntimeError, match="cudaMemcpyAsync failed"):
            mock.svd(a)
    else:
        mock.svd(a)


@pytest.mark.parametrize(("key", "routine"), [(k, r) for k, r in SOLVE.items() if "X" in r])
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
        for succeed in range(12):
            mock.set_allocations_that_succeed(succeed)
            try:
                run()
            except RuntimeError as error:
                text = str(error)
                assert "memory for cuSOLVER's workspace" in text
                assert "CUDA out of memory" in text or "no host memory" in text
            else:
                assert succeed > 0
                break
            finally:
                mock.set_allocations_that_succeed(-1)
        else:
            pytest.fail("never enough memory")


# --- what is left behind ------------------------------------------------------------------------------------------


ILLEGAL_ADDRESS = 700


@pytest.mark.parametrize("key", SVD, ids=str)
def test_no_error_of_a_call_is_left_for_the_next_launch(mock, key) -> None:
    # torch asks cudaGetLastError after each of its own launches, and would blame a kernel of its own.
    mock.fail(SOLVE[key], EXECUTION_FAILED)
    with pytest.raises(RuntimeError, match=r"EXECUTION_FAILED \(6\), info 0; all values are finite$"):
        svd(mock, key)
    assert mock.last_error() == 0
    mock.fail("cusolverDnXsyevBatched", 7)
    with pytest.raises(RuntimeError, match=r"INTERNAL_ERROR \(7\)$"):
        mock.eigh(symmetric(2, 5))
    assert mock.last_error() == 0


@pytest.mark.parametrize("routine", ["cusolverDnXsyevBatched", "cudaStreamSynchronize", "find_not_finite"])
def test_a_lost_context_is_told(mock, routine: str) -> None:
    mock.fail(routine, 6, loses=ILLEGAL_ADDRESS)
    with pytest.raises(RuntimeError, match=f"{routine} failed.*The CUDA context is lost .*: every later CUDA call"):
        mock.eigh(symmetric(3, 6))
    with pytest.raises(RuntimeError, match="The CUDA context is lost") as second:
        mock.eigh(symmetric(3, 6))
    assert str(second.value).count("The CUDA context is lost") == 1


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_that_torch_has_not_got_is_told_in_words_that_are_known(mock) -> None:
    # The stable ABI loses the class of torch.OutOfMemoryError; errors.is_out_of_memory goes by these words.
    torchs = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"
    assert mock.allocation_failure(5, torchs) == f"an op: {torchs}"
    assert mock.allocation_failure(5, None) == "an op: CUDA out of memory. Tried to allocate 5 bytes."
    for words in (torchs, None):
        assert is_out_of_memory(RuntimeError(mock.allocation_failure(5, words)))
    # Before torch 2.13 nothing but the context tells that it was something else.
    mock.lose_context(ILLEGAL_ADDRESS)
    assert "out of memory" not in mock.allocation_failure(5, None)
    assert "The CUDA context is lost" in mock.allocation_failure(5, None)


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


def test_a_thread_owns_one_cublas_handle_per_device_and_takes_it_along(mock) -> None:
    handles = []

    def work() -> None:
        handles.extend(mock.blas_handle(device) for device in (0, 1, 0, 1))

    for threads in (1, 2):
        mock.on_a_thread(work)
        assert mock.created()["blas handle"] == 2 * threads
        assert mock.live()["blas handle"] == 0
    assert handles[:2] == handles[2:4]
    assert handles[0] != handles[1]
    assert mock.log().count("cublasSetStream") == 8
    assert mock.violations() == []  # among them: destroyed while another device is current


@pytest.mark.parametrize("routine", ["cublasCreate", "cublasSetMathMode", "cublasSetAtomicsMode", "cublasSetStream"])
def test_a_cublas_handle_that_cannot_be_had_is_an_error(mock, routine: str) -> None:
    messages = []

    def work() -> None:
        mock.fail(routine, 3)
        try:
            mock.blas_handle(0)
        except RuntimeError as error:
            messages.append(str(error))

    mock.on_a_thread(work)
    assert messages == [f"an op: {routine} failed: mock cuBLAS status, CUDA out of memory"]
    assert mock.live().get("blas handle", 0) == 0
