"""`unirank.matmul`, whose bits do not depend on the number of threads, against torch's own products.

python -m bench.ops.bench_matmul --json out.json
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.support.record import write_result
from bench.support.timing import CPU, compare, parser, row, show
from unirank.matmul import matmul, possible

# Tokens, inputs and outputs of SmolLM2's linears and head, of a sum over tokens, and of square products of a
# decomposition.
SHAPES = [(4096, 576, 1536), (4096, 1536, 576), (4096, 576, 192), (512, 576, 49152), (8, 576, 1536), (576, 2048, 1536)]
SHAPES += [(576, 576, 576), (2048, 2048, 2048)]


def check(a: Tensor, b: Tensor) -> None:
    """The product within the rounding of its sums, and the same bits on one thread."""
    found, threads = matmul(a, b), torch.get_num_threads()
    wide, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    worst = float(((found.double() - wide).abs() / size).max())
    assert worst <= (a.shape[2] + 2) * torch.finfo(a.dtype).eps, f"error {worst:.1e}"
    torch.set_num_threads(1)
    same = torch.equal(found, matmul(a, b))
    torch.set_num_threads(threads)
    assert same, "other bits on one thread"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    if not possible():
        print("This torch multiplies without MKL: unirank leaves its products alone.")
        return 0
    torch.manual_seed(0)
    rows = []
    for T, N, M in [(8, 24, 200)] if arguments.quick else SHAPES:
        for dtype in (torch.float32, torch.float64):
            a, b = torch.randn(1, T, N, dtype=dtype), torch.randn(1, M, N, dtype=dtype).mT
            check(a, b)
            out = a.new_empty(T, M)  # with `out` given, torch's own product runs, whatever was replaced
            times = compare(lambda a=a, b=b: matmul(a, b), lambda a=a[0], b=b[0], o=out: torch.mm(a, b, out=o))
            label = str(dtype).removeprefix("torch.")
            rows.append(row("matmul", f"{T} x {N} x {M}", label, "torch.mm", *times, flops=2 * T * N * M))
    show(rows, CPU)
    write_result(arguments.json, rows, device=CPU, seed=torch.initial_seed())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
