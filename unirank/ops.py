"""The native ops, one function each: what it computes, its fake kernel for torch.compile, and the call.

Kernels are in `unirank_cpu.so` and, where it was built, `unirank_cuda.so`, both from `csrc/`. CUDA tensors without
the latter, and CPU tensors where torch exposes no LAPACK, are served by the torch compositions of `unirank.reference`,
which define the meaning.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from unirank import reference
from unirank.libraries import covers, load_cpu_library, load_cuda_library
from unirank.matmul import keep_order

load_cpu_library()
keep_order()
_cuda = load_cuda_library()
_native = torch.ops.unirank


@torch.compiler.assume_constant_result
@functools.cache
def _has_code(index: int) -> bool:
    return covers(_cuda.architectures, torch.cuda.get_device_capability(index))


def _serving(tensor: Tensor) -> Any:
    """The dispatcher; or the compositions, for a GPU that the loaded library has no code for."""
    if tensor.is_cuda and _cuda.problem is None and not _has_code(tensor.device.index):
        return _Compositions
    return _native


def cosine_accumulate_(state: Tensor, x: Tensor, y: Tensor) -> None:
    """Add the sum of token cosines, of their squares, and the token count to `state`, in one pass over x and y.

    With `cos_t = x_t·y_t / (|x_t| |y_t|)` for token t: `state += (Σ cos_t, Σ cos_t², number of tokens)`. Products and
    sums are fp64. A token where either norm is 0 has cosine 0. A token with a value that is not finite (or, in fp64,
    whose squared norm overflows) makes the first two sums NaN; it is never skipped.
    The bits do not depend on the number of threads.

    Args:
        state: running sums, fp64 [3], contiguous, updated in place; start from zeros.
        x: one stream, [T, D], fp32, fp64, bf16 or fp16.
        y: the other stream, shape and dtype of x.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: UniRank's functional importance, arXiv 2606.21847.
    """
    _serving(x).cosine_accumulate_(state, x, y)


@torch.library.register_fake("unirank::cosine_accumulate_")
def _(state: Tensor, x: Tensor, y: Tensor) -> None:
    reference.check_cosine(state, x, y)


def gram_accumulate_(gram: Tensor, mean: Tensor, x: Tensor) -> None:
    """Add the second moment and the sum of the tokens to `gram` and `mean`.

    `gram += Σ_t x_t x_tᵀ`, `mean += Σ_t x_t`: sums, which become moments when the caller divides by the token count.
    fp64 x is multiplied in fp64; shorter dtypes in fp32 within chunks of tokens, 2048 on a CPU and 8192 on a GPU, whose
    sums then go on in the dtype of gram; docs/numerics.md bounds the error. Only the lower half is computed and read;
    the upper is its mirror, so gram leaves exactly symmetric.
    The bits do not depend on the number of threads.

    Args:
        gram: running sum, [N, N], fp64 or fp32, symmetric, contiguous, updated in place; start from zeros.
        mean: running sum, [N], dtype of gram, contiguous, updated in place; start from zeros.
        x: activations, [T, N], fp32, fp64, bf16 or fp16.

    Raises:
        ValueError: a shape, dtype or device is not as above.

    Source: the input moment C of every activation-aware scheme, for example SVD-LLM, arXiv 2403.07378.
    """
    _serving(x).gram_accumulate_(gram, mean, x)


@torch.library.register_fake("unirank::gram_accumulate_")
def _(gram: Tensor, mean: Tensor, x: Tensor) -> None:
    reference.check_gram(gram, mean, x)


def batched_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of a batch of symmetric matrices, one matrix a thread.

    `a[b] = v[b] diag(w[b]) v[b]ᵀ` with w ascending and orthonormal columns in v (LAPACK syevd). On a CPU a matrix's
    bits depend neither on the number of threads nor on the rest of the batch.

    Args:
        a: symmetric matrices, [B, N, N], fp32 or fp64; only the lower half is read.

    Returns:
        w [B, N] and v [B, N, N], both in the dtype of a.

    Raises:
        ValueError: a shape or dtype is not as above, or a matrix is not finite, did not converge or overflows; the
            message names its index in the batch. Matrices are looked at before a solver gets them.
        RuntimeError: on a GPU: no memory (`unirank.errors.is_out_of_memory` knows the text), or cuSOLVER failed; the
            message says so where the CUDA context is lost, after which every CUDA call of the process fails.

    Source: LAPACK Users' Guide, driver xSYEVD.
    """
    return _serving(a).batched_eigh(a)


@torch.library.register_fake("unirank::batched_eigh")
def _(a: Tensor) -> tuple[Tensor, Tensor]:
    reference.check_eigh(a)
    return a.new_empty(a.shape[:2]), a.new_empty(a.shape)


def batched_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of a batch of matrices, one matrix a thread.

    `a[b] = u[b] diag(s[b]) vh[b]` with s descending, K = min(M, N). On a CPU a matrix's bits depend neither on the
    number of threads nor on the rest of the batch. The CPU kernel divides and
    conquers (LAPACK gesdd); the CUDA kernel is Jacobi up to 32x32, the polar method beyond, and QR iteration where the
    one before it was not exact or did not converge.

    Args:
        a: matrices, [B, M, N], fp32 or fp64.

    Returns:
        u [B, M, K], s [B, K] and vh [B, K, N], all in the dtype of a.

    Raises:
        ValueError: a shape or dtype is not as above, or a matrix is not finite, did not converge or overflows; the
            message names its index in the batch. Matrices are looked at before a solver gets them.
        RuntimeError: on a GPU: no memory (`unirank.errors.is_out_of_memory` knows the text), or cuSOLVER failed; the
            message says so where the CUDA context is lost, after which every CUDA call of the process fails.

    Source: LAPACK Users' Guide, driver xGESDD.
    """
    return _serving(a).batched_svd(a)


@torch.library.register_fake("unirank::batched_svd")
def _(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_svd(a)
    B, M, N = a.shape
    K = min(M, N)
    return a.new_empty((B, M, K)), a.new_empty((B, K)), a.new_empty((B, K, N))


def global_topk(
    value: Tensor,
    cost: Tensor,
    dense_cost: Tensor,
    offsets: Tensor,
    budget: int,
    min_rank: int,
    multiple_of: int,
    pivoted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ranks of all linears that one global ranking of their components buys for an exact budget.

    A rank r of segment l costs `min(r cost_l, dense_cost_l)`, or with pivoted `min(r cost_l - r², dense_cost_l)`; where
    that is dense_cost_l the matrix is dense and its rank is reported as K_l, the segment's length. The pivoted price of
    a matrix with all its min(M, N) components reaches dense_cost exactly at K_l. Every segment starts at the floor,
    min_rank rounded up to multiple_of. Then the longest prefix of all components, by (score descending, segment,
    component), that the budget affords is bought. With multiple_of > 1 ranks that are neither dense nor the floor are
    rounded down to a multiple, and what that frees is spent again in the same order by whole multiples, a segment being
    closed by its first step that does not fit. With multiple_of = 1 ranks never fall as the budget grows.

    Args:
        value: scores, segment after segment, [C], fp64 or fp32, finite, non-increasing inside a segment.
        cost: M + N, the parameters of one rank in two factors, int64 [L], positive; with pivoted at least 2 K_l.
        dense_cost: parameters of the dense matrix, M N, int64 [L], positive.
        offsets: where each segment starts, and C at the end, int64 [L + 1], strictly increasing from 0.
        budget: parameters that may be spent.
        min_rank: rank that every segment gets first, at least 0.
        multiple_of: granularity of ranks, at least 1.
        pivoted: the price of pivoted storage, where r rows of the left factor are the identity and are not stored.

    Returns:
        ranks, int64 [L], and threshold, fp64 []: the smallest score that the prefix bought beyond the floor, +inf
            where it bought none.

    Raises:
        ValueError: an argument is not as above (the message names the segment or the index), or the floor alone
            costs more than the budget.

    Source: UniRank's sorting and truncation, arXiv 2606.21847; pivoted storage is PIFA's, arXiv 2501.19090.
    """
    return _serving(value).global_topk(value, cost, dense_cost, offsets, budget, min_rank, multiple_of, pivoted)


@torch.library.register_fake("unirank::global_topk")
def _(
    value: Tensor,
    cost: Tensor,
    dense_cost: Tensor,
    offsets: Tensor,
    budget: int,
    min_rank: int,
    multiple_of: int,
    pivoted: bool = False,
) -> tuple[Tensor, Tensor]:
    reference.check_topk(value, cost, dense_cost, offsets)
    return cost.new_empty(cost.shape), value.new_empty((), dtype=torch.float64)


def has_lapack() -> bool:
    """Whether the CPU kernels reach the LAPACK inside torch; without, eigh and svd are torch compositions."""
    return _native.has_lapack()


def has_cuda_kernels() -> bool:
    """Whether CUDA tensors are served by `unirank_cuda.so`; without, by the torch compositions.

    False too where the library has no code for the current device; without a usable device, whether it is loaded.
    """
    return cuda_kernels_missing() is None


def cuda_kernels_missing() -> str | None:
    """Why CUDA tensors are served by torch compositions, a sentence without its end; None where kernels serve them."""
    if _cuda.problem is not None or not torch.cuda.is_available():
        return _cuda.problem
    index = torch.cuda.current_device()
    if _has_code(index):
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"unirank_cuda.so has no code for {torch.cuda.get_device_name(index)} (capability {major}.{minor}); "
        f"it was built for {', '.join(_cuda.architectures)}"
    )


def _global_topk_on_host(
    value: Tensor,
    cost: Tensor,
    dense_cost: Tensor,
    offsets: Tensor,
    budget: int,
    min_rank: int,
    multiple_of: int,
    pivoted: bool = False,
) -> tuple[Tensor, Tensor]:
    reference.check_topk(value, cost, dense_cost, offsets)
    on_host = (t.cpu() for t in (value, cost, dense_cost, offsets))
    ranks, threshold = _native.global_topk(*on_host, budget, min_rank, multiple_of, pivoted)
    return ranks.to(value.device), threshold.to(value.device)


class _Compositions:
    """What serves CUDA tensors without a kernel; the names are those of the ops."""

    cosine_accumulate_ = staticmethod(reference.cosine_accumulate_)
    gram_accumulate_ = staticmethod(reference.gram_accumulate_)
    batched_eigh = staticmethod(reference.batched_eigh)
    batched_svd = staticmethod(reference.batched_svd)
    global_topk = staticmethod(_global_topk_on_host)


def _register_compositions() -> None:
    lapack_ops = ("batched_eigh", "batched_svd")
    if _cuda.problem is not None:
        for name in ("cosine_accumulate_", "gram_accumulate_", *lapack_ops, "global_topk"):
            torch.library.impl(f"unirank::{name}", "CUDA", getattr(_Compositions, name))
    if not has_lapack():
        for name in lapack_ops:
            torch.library.impl(f"unirank::{name}", "CPU", getattr(reference, name))


_register_compositions()
