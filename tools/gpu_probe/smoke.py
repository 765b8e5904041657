"""Steps smoke, compositions, sanitize, nan: every op against the CPU; at edges; on input that is not finite."""

from __future__ import annotations

from typing import Any

import torch

from tools.gpu_probe.answers import Probe, short
from unirank import libraries


def compositions(probe: Probe) -> None:
    """`smoke` as where `unirank_cuda.so` was not built."""
    libraries.load_cuda_library = lambda: libraries.CudaLibrary("left out, to run the compositions")
    smoke(probe)


def smoke(probe: Probe) -> None:
    """Every op once, with how far it is from the CPU or from float64."""
    from unirank import ops  # here, so that `compositions` may come first

    probe.put("kernels", native=ops.has_cuda_kernels(), missing=ops.cuda_kernels_missing(), lapack=ops.has_lapack())
    g = torch.Generator().manual_seed(0)

    def zeros(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.zeros(shape, dtype=torch.float64, device=probe.at) for shape in shapes]

    def cosine() -> dict[str, Any]:
        x, y = (torch.randn(777, 4096, generator=g).bfloat16() for _ in range(2))
        want, (found,) = torch.zeros(3, dtype=torch.float64), zeros((3,))
        ops.cosine_accumulate_(want, x, y)
        ops.cosine_accumulate_(found, x.to(probe.at), y.to(probe.at))
        return {"difference": float((want - found.cpu()).abs().max())}

    def gram(dtype: torch.dtype) -> dict[str, Any]:
        n = 110 if probe.tiny else 1100
        x = torch.randn(5000, n, generator=g).to(dtype)
        found, mean = zeros((n, n), (n,))
        ops.gram_accumulate_(found, mean, x.to(probe.at))
        truth = x.double().T @ x.double()
        return {"relative": float((found.cpu() - truth).norm() / truth.norm())}

    def one_row() -> dict[str, Any]:
        """A view whose stride is 1 though its rows are 64 long."""
        x = torch.randn(64, 1, generator=g).to(probe.at).T
        found, mean = zeros((64, 64), (64,))
        ops.gram_accumulate_(found, mean, x)
        return {"difference": float((found - x.double().T @ x.double()).abs().max())}

    def eigh(n: int, dtype: torch.dtype) -> dict[str, Any]:
        x = torch.randn(3, 2 * n, n, generator=g, dtype=torch.float64)
        a = (x.mT @ x).to(dtype).to(probe.at)
        return eigh_errors(a, *ops.batched_eigh(a))

    def svd(m: int, n: int) -> dict[str, Any]:
        a = torch.randn(2, m, n, generator=g, dtype=torch.float64).to(probe.at)
        u, s, vh = ops.batched_svd(a)
        residual = float(((u * s[:, None]) @ vh - a).norm() / a.norm())
        return {"residual": residual, "descending": bool((s.diff() <= 0).all())}

    def topk() -> dict[str, Any]:
        value = torch.rand(200, 500, generator=g, dtype=torch.float64).sort(1, descending=True).values.flatten()
        rest = (torch.full((200,), 1500), torch.full((200,), 500000), torch.arange(201) * 500)
        want = ops.global_topk(value, *rest, 60_000_000, 1, 8)
        found = ops.global_topk(value.to(probe.at), *(t.to(probe.at) for t in rest), 60_000_000, 1, 8)
        return {"equal": all(torch.equal(a, b.cpu()) for a, b in zip(want, found, strict=True))}

    probe.attempt("cosine", cosine)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        probe.attempt(f"gram {short(dtype)}", lambda d=dtype: gram(d))
    probe.attempt("gram of one row", one_row)
    for n in (7, 33, 576):
        for dtype in (torch.float32, torch.float64):
            probe.attempt(f"eigh {n} {short(dtype)}", lambda n=n, d=dtype: eigh(n, d))
    for m, n in ((20, 9), (300, 65), (65, 300)):
        probe.attempt(f"svd {m} x {n}", lambda m=m, n=n: svd(m, n))
    probe.attempt("topk", topk)


def eigh_errors(a: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Relative residual, loss of orthogonality, and whether the eigenvalues ascend; in float64."""
    a, w, v = a.double(), w.double(), v.double()
    eye = torch.eye(a.shape[-1], dtype=torch.float64, device=a.device)
    return {
        "residual": float((a @ v - v * w[:, None]).norm() / a.norm()),
        "orthogonality": float((v.mT @ v - eye).abs().max()),
        "ascending": bool((w.diff() >= 0).all()),
    }


def sanitize(probe: Probe) -> None:
    """The project's own kernels at edges, for compute-sanitizer; with PYTORCH_NO_CUDA_MEMORY_CACHING=1."""
    from unirank import ops

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=probe.at)

    for T, N in ((1, 1), (33, 31), (257, 130), (2050, 65)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            x, y = (torch.randn(T, N, device=probe.at).to(dtype) for _ in range(2))
            ops.cosine_accumulate_(zeros(3), x, y)
            for kept in (torch.float64, torch.float32):
                ops.gram_accumulate_(zeros(N, N, dtype=kept), zeros(N, dtype=kept), x)
    wide = torch.randn(40, 1500, device=probe.at).bfloat16()
    ops.cosine_accumulate_(zeros(3), wide[:, 1:1301], wide[:, 7:1307])
    for dtype in (torch.float32, torch.float64):
        value = torch.rand(9, 77, device=probe.at, dtype=dtype).sort(1, descending=True).values.flatten()
        rest = [torch.full((9,), v, device=probe.at) for v in (200, 9000)] + [torch.arange(10, device=probe.at) * 77]
        for multiple in (1, 8):
            ops.global_topk(value, *rest, 40_000, 1, multiple)
    probe.settle()
    probe.put("ran to its end", ok=True)


def not_finite(probe: Probe) -> None:
    """What the ops say of input that is not finite, and whether the device can be used after it."""
    from unirank import ops

    for op in (ops.batched_eigh, ops.batched_svd):
        for n, dtype, bad in ((9, torch.float32, float("inf")), (40, torch.float64, float("nan"))):
            a = torch.randn(4, n, n)
            a = (a + a.mT).to(dtype)
            a[2, 5, 3] = a[2, 3, 5] = bad

            def run(op: Any = op, a: torch.Tensor = a) -> dict[str, Any]:
                try:
                    op(a.to(probe.at))
                except Exception as error:
                    said = f"{type(error).__name__}: {error}"[:300]
                else:
                    said = "no error"
                usable = float(torch.ones(3, device=probe.at).sum()) == 3.0
                return {"says": said, "usable_after": usable, "as_meant": "matrix 2 of the batch is not finite" in said}

            probe.attempt(f"{op.__name__} {n} {short(dtype)} {bad}", run)
