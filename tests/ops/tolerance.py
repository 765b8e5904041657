"""The one home of the ops' tolerance: what a result is held to, whichever device made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_as_good_as_torch(got: Tensor, plain: Tensor, truth: Tensor, *, ulps: float = 4) -> None:
    """Error against fp64 at most twice what plain torch makes in the same dtype.

    `ulps` of the largest true value, in the precision of `plain`, are granted to both: where torch happens to be exact
    the rule would ask for exactness.
    """
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    truth = truth.double()
    allowed = 2 * (plain.double() - truth).abs().max() + ulps * torch.finfo(plain.dtype).eps * truth.abs().max()
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e}"


# c of the bounds c n eps |A| that hold for a backward stable method (**choice**: 10; its error is mostly below 1, and
# LAPACK's own tests allow some tens).
STABLE = 10


def gram_bound(tokens: int, group: int = 4, extra_bits: int = 0) -> float:
    """Error that a gram in float32 may have on a GPU, over the gram of the absolute values, entry by entry.

    A tensor core adds the products of `group` tokens to a float32 sum at once, cuts each product off `extra_bits` below
    the sum's last bit, and the sum at it (docs/numerics.md). The defaults are the oldest tensor core's, the worst;
    rounding to nearest, one by one, loses less. The products' own rounding and the last sums are the 8.
    """
    return (tokens * (2.0**-extra_bits + 1 / group) + 8) * torch.finfo(torch.float32).eps


def assert_same_cosine_sums(got: Tensor, want: Tensor) -> None:
    # Products are exact and sums are fp64 on both sides, so every dtype is held to fp64.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11, equal_nan=True)


def assert_moments(gram: Tensor, mean: Tensor, rows: Tensor, truth: Tensor) -> None:
    """`gram` is symmetric, and it and `mean` are as good as torch's; `truth` is `rowsᵀ rows`."""
    assert torch.equal(gram, gram.T)
    # What torch makes of 16-bit rows without the op: widened to fp32, which is also what the op promises.
    plain = rows if rows.dtype == gram.dtype == torch.float64 else rows.float()
    assert_as_good_as_torch(gram, plain.T @ plain, truth)
    assert_as_good_as_torch(mean, plain.sum(0), rows.double().sum(0))


def assert_moments_on_gpu(gram: Tensor, mean: Tensor, rows: Tensor, chunk: int = 8192) -> None:
    """`gram` is symmetric and as exact as `docs/numerics.md` says; `mean` was added up in float64.

    `chunk` tokens are summed in the dtype of the products before float64; a gram in float32 goes on in float32.
    """
    assert torch.equal(gram, gram.T)
    wide = rows.double()
    scale = wide.abs().T @ wide.abs()
    if rows.dtype == gram.dtype == torch.float64:
        bound = STABLE * (len(rows) + 1) * torch.finfo(torch.float64).eps
    else:
        longest = len(rows) if gram.dtype == torch.float32 else min(len(rows), chunk)
        bound = gram_bound(longest)
    assert bool(((gram.double() - wide.T @ wide).abs() <= bound * scale).all())
    allowed = 4 * torch.finfo(mean.dtype).eps * (wide.abs().sum(0) + 1e-300)
    assert bool(((mean.double() - wide.sum(0)).abs() <= allowed).all())


def _within(error: Tensor, n: int, scale: Tensor | float, dtype: torch.dtype, what: str) -> None:
    allowed = STABLE * n * torch.finfo(dtype).eps * torch.as_tensor(scale, dtype=torch.float64)
    worst = torch.linalg.matrix_norm(error.double()) if error.dim() == 3 else error.double().abs().amax(-1)
    assert bool((worst <= allowed).all()), f"{what}: {float(worst.max()):.3e} exceeds {float(allowed.min()):.3e}"


def _assert_orthonormal_on_gpu(q: Tensor, n: int) -> None:
    eye = torch.eye(q.shape[2], dtype=torch.float64)
    _within(_gram(q) - eye, n, 1.0, q.dtype, "departure from orthonormal columns")


def assert_eigh_on_gpu(a: Tensor, w: Tensor, v: Tensor) -> None:
    """Ascending eigenvalues, `V diag(w) Vᵀ = A` and `VᵀV = I`, as a backward stable method makes them.

    Each within `c n eps` of the truth, relative to the norm of A: another algorithm than torch's may be a little worse
    than torch, so torch's own error is no bound.
    """
    assert w.dtype == v.dtype == a.dtype
    assert v.is_contiguous()
    assert bool((w.diff() >= 0).all())
    if a.numel() == 0:
        return
    n, norm = a.shape[1], torch.linalg.matrix_norm(a.double())
    _within(w.double() - torch.linalg.eigvalsh(a.double()), n, norm, a.dtype, "eigenvalues")
    _within(
        v.double() @ torch.diag_embed(w.double()) @ v.double().mT - a.double(), n, norm, a.dtype, "V diag(w) Vᵀ - A"
    )
    _assert_orthonormal_on_gpu(v, n)


def assert_svd_on_gpu(a: Tensor, found: Sequence[Tensor]) -> None:
    """Descending singular values, `U diag(s) Vh = A`, orthonormal vectors, each as `assert_eigh_on_gpu` has it."""
    (B, M, N), K = a.shape, min(a.shape[1:])
    u, s, vh = found
    assert (u.shape, s.shape, vh.shape) == ((B, M, K), (B, K), (B, K, N))
    assert bool((s.diff() <= 0).all())
    assert bool((s >= 0).all())
    n, norm = max(M, N), torch.linalg.matrix_norm(a.double())
    _within(s.double() - torch.linalg.svdvals(a.double()), n, norm, a.dtype, "singular values")
    _within((u.double() * s.double()[:, None]) @ vh.double() - a.double(), n, norm, a.dtype, "U diag(s) Vh - A")
    _assert_orthonormal_on_gpu(u, n)
    _assert_orthonormal_on_gpu(vh.mT, n)


def _gram(q: Tensor) -> Tensor:
    return q.double().mT @ q.double()


def assert_orthonormal(q: Tensor, plain: Tensor) -> None:
    """The columns of `q` are orthonormal, as well as those of `plain`."""
    eye = torch.eye(q.shape[2], dtype=torch.float64).expand(q.shape[0], -1, -1)
    assert_as_good_as_torch(_gram(q).to(q.dtype), _gram(plain).to(q.dtype), eye)


def assert_eigh(a: Tensor, w: Tensor, v: Tensor) -> None:
    """Ascending eigenvalues, `V diag(w) Vᵀ = A` and `VᵀV = I`, each as good as torch's on the CPU."""
    assert w.dtype == v.dtype == a.dtype
    assert v.is_contiguous()
    assert bool((w.diff() >= 0).all())
    plain_w, plain_v = torch.linalg.eigh(a)
    assert_as_good_as_torch(w, plain_w, torch.linalg.eigvalsh(a.double()))
    rebuilt = v.double() @ torch.diag_embed(w.double()) @ v.double().mT
    plain = plain_v.double() @ torch.diag_embed(plain_w.double()) @ plain_v.double().mT
    assert_as_good_as_torch(rebuilt.to(a.dtype), plain.to(a.dtype), a)
    assert_orthonormal(v, plain_v)


def assert_svd(a: Tensor, found: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """Descending singular values, `U diag(s) Vh = A` and orthonormal vectors, each as good as `plain`, torch's SVD."""
    (B, M, N), K = a.shape, min(a.shape[1:])
    u, s, vh = found
    plain_u, plain_s, plain_vh = plain
    assert (u.shape, s.shape, vh.shape) == ((B, M, K), (B, K), (B, K, N))
    assert bool((s.diff() <= 0).all())
    assert_as_good_as_torch(s, plain_s, torch.linalg.svdvals(a.double()))
    rebuilt = (u.double() * s.double()[:, None]) @ vh.double()
    plain_rebuilt = (plain_u.double() * plain_s.double()[:, None]) @ plain_vh.double()
    assert_as_good_as_torch(rebuilt.to(a.dtype), plain_rebuilt.to(a.dtype), a)
    assert_orthonormal(u, plain_u)
    assert_orthonormal(vh.mT, plain_vh.mT)


def assert_same_bits_for_any_thread_count(run: Callable[[], Sequence[Tensor]]) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            assert torch.equal(first, other)
