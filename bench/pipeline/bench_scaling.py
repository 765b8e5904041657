"""How the analysis time grows with tokens, layers and width, on random Llamas, with the exponents fitted.

    python -m bench.pipeline.bench_scaling --json out.json

An exponent is the slope of log(seconds) over log(size). Expected: 1 in tokens and layers apart from fixed costs
(hashes, tokenising), between 2 (forward, Gram) and 3 (decomposition) in width.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import unirank
from bench.support import synthetic
from bench.support.record import write_result
from bench.support.timing import parser, row, show

BASE = {"tokens": 8192, "layers": 4, "hidden": 256}
SIZES = {"tokens": (4096, 8192, 16384), "layers": (2, 4, 8), "hidden": (128, 256, 512)}
QUICK_BASE = {"tokens": 512, "layers": 1, "hidden": 32}
QUICK_SIZES = {"tokens": (256, 512), "layers": (1, 2), "hidden": (32, 64)}


def analysis_seconds(text: Path, *, tokens: int, layers: int, hidden: int, repeats: int) -> list[float]:
    loaded = synthetic.llama(hidden=hidden, layers=layers)
    calibration = unirank.Calibration(text=str(text), windows=tokens // 128, window=128, batch=8)
    times = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            unirank.analyze(loaded, Path(scratch) / "store", calibration=calibration)
            times.append(time.perf_counter() - start)
    return times


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Least squares in the logarithms."""
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(t) for t in times]).slope


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__).parse_args(argv)
    base, axes = (QUICK_BASE, QUICK_SIZES) if arguments.quick else (BASE, SIZES)
    repeats = 1 if arguments.quick else min(arguments.repeats, 3)
    rows, exponents = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        text = synthetic.text(Path(scratch))
        analysis_seconds(text, **(base | {"layers": 1}), repeats=1)  # warms up
        for axis, sizes in axes.items():
            times = {size: analysis_seconds(text, **(base | {axis: size}), repeats=repeats) for size in sizes}
            exponents[axis] = slope(list(times), [min(t) for t in times.values()])
            first = times[sizes[0]]
            for size, t in times.items():
                more = {"axis": axis, "size": size, "exponent": exponents[axis]}
                rows.append(row("analysis", f"{axis} {size}", "float32", f"{axis} {sizes[0]}", t, first, **more))
    show(rows)
    print("exponents: " + ", ".join(f"{axis} {value:.2f}" for axis, value in exponents.items()))
    write_result(arguments.json, rows, seed=torch.initial_seed(), exponents=exponents)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
