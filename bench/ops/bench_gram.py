"""`gram_accumulate_` against `addmm` of xᵀx and the twin, beside this machine's matrix product.

    python -m bench.ops.bench_gram --json out.json

GFLOP/s count the products that a symmetric result needs, `T N (N + 1)`; `addmm` makes twice as many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.support.record import write_result
from bench.support.roofline import gpu_floor, gram_work
from bench.support.shapes import MODELS
from bench.support.timing import compare, device_of, ended, judged, matmul_rate, op_parser, row, show, warm
from unirank import ops, reference


def accumulate(op, x: Tensor, dtype: torch.dtype) -> Tensor:
    gram, total = (torch.zeros(shape, dtype=dtype, device=x.device) for shape in (x.shape[1:] * 2, x.shape[1:]))
    op(gram, total, x)
    return gram


def check(x: Tensor) -> None:
    """Against float64 no worse than twice torch, also where the moment is rank-deficient, has outliers or denormals."""
    deficient = x[:, :1] * torch.randn(x.shape[1], device=x.device).to(x.dtype)
    outlier, tiny = x.clone(), x * torch.finfo(x.dtype).smallest_normal
    outlier[:, 0] *= 1000
    for case in (x, deficient, outlier, tiny):
        truth = case.double().T @ case.double()
        plain = (case.float().T @ case.float()).double()
        error = (accumulate(ops.gram_accumulate_, case, torch.float64) - truth).abs().max()
        assert error <= 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = op_parser(__doc__).parse_args(argv)
    device = device_of(arguments)
    shapes = [(64, 96)] if arguments.quick else [(4096, 1536), (4096, 576)]
    shapes += [(4096, width) for name in arguments.models or [] for width in MODELS[name].inputs]
    rows = []
    for T, N in dict.fromkeys(shapes):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(T, N, device=device).to(dtype)
            checked = judged(lambda x=x: check(x[:, :128]), device)
            target = torch.zeros(N, N, device=device)

            def addmm(x: Tensor = x, target: Tensor = target) -> Tensor:
                x = x.float()
                return torch.addmm(target, x.T, x)

            def twin(x: Tensor = x) -> Tensor:
                return accumulate(reference.gram_accumulate_, x, torch.float64)

            for kept in (torch.float32, torch.float64):
                for name, baseline in (("addmm", addmm), ("twin", twin)):
                    gram, total = (torch.zeros(shape, dtype=kept, device=device) for shape in ((N, N), (N,)))
                    pair = (lambda x=x, gram=gram, total=total: ops.gram_accumulate_(gram, total, x), baseline)
                    times = compare(*pair, arguments.repeats if name == "addmm" else 3, device)
                    label = f"{str(dtype).removeprefix('torch.')} into {str(kept).removeprefix('torch.')}"
                    rate = matmul_rate(torch.float32, 96 if arguments.quick else 1536, device=device)
                    floor = gpu_floor(gram_work(T, N, dtype, kept), device)
                    more = {"flops": T * N * (N + 1), "matmul_gflops": rate} | checked
                    more |= warm(*pair, device)
                    rows.append(row("gram", f"{T} x {N}", label, name, *times, floor=floor, **more))
    show(rows, device)
    write_result(arguments.json, rows, device=device, seed=torch.initial_seed())
    return ended(rows)


if __name__ == "__main__":
    raise SystemExit(main())
