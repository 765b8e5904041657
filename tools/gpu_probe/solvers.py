"""Step solvers: eigenproblems of one matrix, of several, and of several at a time, which decide the time of a job."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tools.gpu_probe.answers import Probe, short
from tools.gpu_probe.smoke import eigh_errors
from unirank import ops

BATCH = 7  # linears of a Llama's layer


def moment(device: torch.device, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A symmetric matrix whose eigenvalues fall over eight decades."""
    q = torch.linalg.qr(torch.randn(n, n, device=device, dtype=torch.float64)).Q
    a = (q * torch.logspace(0, -8, n, device=device, dtype=torch.float64)) @ q.T
    return ((a + a.T) / 2).to(dtype)


def solvers(probe: Probe) -> None:
    """Times and errors, ours and torch's."""
    sizes = (64,) if probe.tiny else (1024, 2048, 4096)
    for n in sizes:
        for dtype in (torch.float64, torch.float32):
            eigenproblems(probe, moment(probe.at, n, dtype).expand(BATCH, n, n).clone())
    around(probe, sizes[-1], 160 if probe.tiny else 11008)
    if not probe.tiny:
        large = moment(probe.at, 8192)[None]
        probe.time("batched_eigh 1 of 8192 float64", lambda: ops.batched_eigh(large), 1, 0)


def eigenproblems(probe: Probe, a: torch.Tensor) -> None:
    """`a`: `BATCH` equal matrices."""
    label = f"{a.shape[1]} {short(a.dtype)}"
    for b in (1, BATCH):
        probe.time(f"batched_eigh {b} of {label}", lambda b=b: ops.batched_eigh(a[:b]))
        probe.time(f"torch.linalg.eigh {b} of {label}", lambda b=b: torch.linalg.eigh(a[:b]))
    for threads in (2, 4, BATCH) if probe.on_gpu else ():

        def at_a_time(threads: int = threads) -> None:
            streams = [torch.cuda.Stream() for _ in range(threads)]

            def one(i: int) -> None:
                with torch.cuda.stream(streams[i % threads]):
                    ops.batched_eigh(a[i : i + 1])

            probe.settle()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(one, range(BATCH)))
            probe.settle()

        probe.time(f"batched_eigh {BATCH} of {label}, {threads} at a time", at_a_time, 2)

    def errors() -> dict[str, Any]:
        found = {"ours": ops.batched_eigh(a[:1]), "torch": torch.linalg.eigh(a[:1])}
        return {f"{who}_{key}": v for who, pair in found.items() for key, v in eigh_errors(a[:1], *pair).items()}

    probe.attempt(f"errors of eigh {label}", errors)


def around(probe: Probe, n: int, m: int) -> None:
    """What else a decomposition of an m x n weight does, in float64."""
    w, c = torch.randn(m, n, device=probe.at, dtype=torch.float64), moment(probe.at, n)
    probe.time("W C W' of a square weight", lambda: w[:n] @ c @ w[:n].T)
    probe.time("Gram of a tall weight", lambda: w.T @ w)
    gram = w.T @ w
    probe.time("Cholesky", lambda: torch.linalg.cholesky_ex(gram, upper=True))
    r = torch.linalg.cholesky_ex(gram, upper=True)[0]
    probe.time("triangular solve", lambda: torch.linalg.solve_triangular(r, c, upper=True))
    probe.time("Householder QR of a tall weight", lambda: torch.linalg.qr(w), 1)
    probe.time("batched_svd of a tall weight", lambda: ops.batched_svd(w[None]), 1, 0)
