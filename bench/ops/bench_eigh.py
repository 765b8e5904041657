"""`batched_eigh` against torch.linalg.eigh and svd, and `batched_svd` against svd, on moments of activations.

python -m bench.ops.bench_eigh --json out.json
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.support.record import write_result
from bench.support.roofline import eigh_work, gpu_floor
from bench.support.timing import compare, device_of, ended, judged, op_parser, row, show, warm
from unirank import ops


def moments(B: int, N: int, dtype: torch.dtype, deficient: bool = False) -> Tensor:
    """Moments with a spectrum over six decades, or of a third of the rank."""
    x = torch.randn(B, N // 3 if deficient else 2 * N, N, dtype=torch.float64)
    x = x * torch.logspace(0, -3, N, dtype=torch.float64)
    return (x.mT @ x / x.shape[1]).to(dtype)


def errors(a: Tensor, w: Tensor, v: Tensor) -> tuple[float, float]:
    """Largest relative residual `|A V - V W|` and loss of orthogonality `|VᵀV - I|`, in float64."""
    a, w, v = a.double(), w.double(), v.double()
    residual = (a @ v - v * w[:, None]).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)
    eye = torch.eye(a.shape[1], dtype=torch.float64, device=a.device)
    return residual.max().item(), (v.mT @ v - eye).flatten(1).norm(dim=1).max().item()


def check(a: Tensor) -> dict[str, float]:
    """Residual and orthogonality at most twice torch's."""
    residual, orthogonality = errors(a, *ops.batched_eigh(a))
    torch_residual, torch_orthogonality = errors(a, *torch.linalg.eigh(a))
    assert residual <= 2 * torch_residual, f"residual {residual:.1e}, torch's {torch_residual:.1e}"
    assert orthogonality <= 2 * torch_orthogonality, f"orthogonality {orthogonality:.1e}"
    return {
        "residual": residual,
        "torch_residual": torch_residual,
        "orthogonality": orthogonality,
        "torch_orthogonality": torch_orthogonality,
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = op_parser(__doc__).parse_args(argv)
    device = device_of(arguments)
    torch.manual_seed(0)
    shapes = [(2, 24)] if arguments.quick else [(30, 576), (30, 192)]
    if device.type == "cuda" and not arguments.quick:
        shapes += [(7, 1024), (7, 2048), (7, 4096), (1, 4096)]  # linears of a layer, and one of them
    rows = []
    for B, N in shapes:
        for dtype in (torch.float32, torch.float64):
            a = moments(B, N, dtype).to(device)
            more = judged(lambda a=a: check(a), device) | {"flops": 9 * B * N**3}
            hard = moments(2, N, dtype, deficient=True).to(device)
            more = judged(lambda a=hard: check(a) and None, device) | more
            floor = gpu_floor(eigh_work(B, N, dtype), device)
            shape, label = f"{B} x {N} x {N}", str(dtype).removeprefix("torch.")
            repeats = min(arguments.repeats, 5)
            pair = (lambda a=a: ops.batched_eigh(a), lambda a=a: torch.linalg.eigh(a))
            eigh = compare(*pair, min(repeats, 3) if N > 576 else repeats, device)
            both = more | warm(*pair, device, 1 if N > 576 else 3)
            rows.append(row("eigh", shape, label, "torch.linalg.eigh", *eigh, floor=floor, **both))
            if N > 576 or (N == 576 and dtype == torch.float64):
                continue  # minutes, and nobody waits for it
            svd = compare(lambda a=a: ops.batched_eigh(a), lambda a=a: torch.linalg.svd(a), min(repeats, 3), device)
            rows.append(row("eigh", shape, label, "torch.linalg.svd", *svd, floor=floor, **more))
    show(rows, device)
    write_result(arguments.json, rows, device=device, seed=torch.initial_seed())
    return ended(rows)


if __name__ == "__main__":
    raise SystemExit(main())
