"""`cosine_accumulate_` against the torch composition, the twin and numpy, beside this machine's read rate.

python -m bench.ops.bench_cosine --json out.json
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bench.support.record import write_result
from bench.support.roofline import cosine_work, gpu_floor
from bench.support.shapes import MODELS
from bench.support.timing import compare, device_of, ended, judged, op_parser, read_rate, row, show, warm
from unirank import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def composition(x: Tensor, y: Tensor) -> Tensor:
    """What one writes without the op."""
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
    return torch.stack((cosine.sum(), (cosine * cosine).sum()))


def in_numpy(x: Tensor, y: Tensor) -> float:
    a, b = x.double().cpu().numpy(), y.double().cpu().numpy()
    cosine = (a * b).sum(1) / (np.sqrt((a * a).sum(1)) * np.sqrt((b * b).sum(1)))
    return float(cosine.sum())


def accumulate(op, x: Tensor, y: Tensor) -> Tensor:
    state = torch.zeros(3, dtype=torch.float64, device=x.device)
    op(state, x, y)
    return state


def check(x: Tensor, y: Tensor) -> None:
    """The op equals its twin and numpy in float64, zeros and denormals included, and infinities poison the sums."""
    torch.testing.assert_close(accumulate(ops.cosine_accumulate_, x, y), accumulate(reference.cosine_accumulate_, x, y))
    assert abs(accumulate(ops.cosine_accumulate_, x, y)[0].item() - in_numpy(x, y)) < 1e-9 * len(x)
    hard = x[:4].clone()
    hard[0] = 0
    hard[1] = torch.finfo(x.dtype).smallest_normal / 4
    torch.testing.assert_close(
        accumulate(ops.cosine_accumulate_, hard, y[:4]), accumulate(reference.cosine_accumulate_, hard, y[:4])
    )
    hard[2, 0] = float("inf")
    assert accumulate(ops.cosine_accumulate_, hard, y[:4])[0].isnan()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = op_parser(__doc__).parse_args(argv)
    device = device_of(arguments)
    shapes = [(64, 96)] if arguments.quick else [(4096, 4096)]
    names = arguments.models or ([] if arguments.quick else ["smollm2-135m"])
    shapes += [(4096, MODELS[name].hidden) for name in names]
    rows = []
    for T, D in dict.fromkeys(shapes):
        for dtype in DTYPES:
            x = torch.randn(T, D, device=device).to(dtype)
            y = (x + torch.randn(T, D, device=device)).to(dtype)
            checked = judged(lambda x=x, y=y: check(x, y), device)
            read_bytes = 2 * x.numel() * x.element_size()
            floor = gpu_floor(cosine_work(T, D, dtype), device)
            for name, baseline in (
                ("cosine_similarity and sums", lambda x=x, y=y: composition(x, y)),
                ("twin", lambda x=x, y=y: accumulate(reference.cosine_accumulate_, x, y)),
                ("numpy", lambda x=x, y=y: in_numpy(x, y)),
            ):
                if name == "numpy" and device.type != "cpu":
                    continue
                repeats = arguments.repeats if name.startswith("cos") else 3
                pair = (lambda x=x, y=y: accumulate(ops.cosine_accumulate_, x, y), baseline)
                times = compare(*pair, repeats, device)
                # Beside every row: on a shared machine it changes by the minute.
                rate = read_rate(read_bytes, device=device)
                best = read_bytes / min(times[0]) / 1e9
                label = str(dtype).removeprefix("torch.")
                more = {"read_bytes": read_bytes, "read_gbs": rate, "of_read": best / rate} | checked
                more |= warm(*pair, device)
                rows.append(row("cosine", f"{T} x {D}", label, name, *times, floor=floor, **more))
    show(rows, device)
    for r in rows:
        if r["baseline"].startswith("cos"):
            print(f"{r['shape']} {r['dtype']}: {r['of_read']:.0%} of a plain read ({r['read_gbs']:.1f} GB/s)")
    write_result(arguments.json, rows, device=device, seed=torch.initial_seed())
    return ended(rows)


if __name__ == "__main__":
    raise SystemExit(main())
