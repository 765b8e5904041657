"""How the benchmarks measure: cold caches, the baseline interleaved with the op, and this machine's own limits.

On a GPU a time runs from an idle device to an idle device, launches included: what a caller waits for. Beside it stands
the time of a warm launch among others, by the device's own events.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unirank import ops

CPU = torch.device("cpu")
# Larger than the last-level cache of the machines at hand.
_FLUSH = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


def device_of(arguments: argparse.Namespace) -> torch.device:
    """What `--device` names. Without a usable GPU the program ends here: with 0, or 1 under UNIRANK_REQUIRE_CUDA=1."""
    if arguments.device == "cpu":
        return CPU
    missing = ops.cuda_kernels_missing() if torch.cuda.is_available() else "no CUDA device is usable"
    if missing is None:
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("UNIRANK_REQUIRE_CUDA") == "1":
        sys.exit(f"UNIRANK_REQUIRE_CUDA=1, but {missing}")
    print(f"skipped: {missing}")
    sys.exit(0)


def flush(device: torch.device = CPU) -> None:
    """Push everything out of the caches."""
    torch.ones(_FLUSH[device.type] // 4, device=device).add_(1)


def synchronise(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """One cold run."""
    flush(device)
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def compare(
    run: Callable[[], object], baseline: Callable[[], object], repeats: int = 7, device: torch.device = CPU
) -> tuple[list[float], list[float]]:
    """Seconds of `run` and of `baseline`, turn by turn, so that a busy machine hurts both alike."""
    run()
    baseline()
    pairs = [(seconds(run, device), seconds(baseline, device)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def warm(
    run: Callable[[], object], baseline: Callable[[], object], device: torch.device, repeats: int = 10
) -> dict[str, float]:
    """On a GPU `warm_seconds` and `baseline_warm_seconds`: of `repeats` launches in a row, each; elsewhere nothing."""
    if device.type != "cuda":
        return {}

    def mean(work: Callable[[], object]) -> float:
        work()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats

    return {"warm_seconds": mean(run), "baseline_warm_seconds": mean(baseline)}


def judged(check: Callable[[], dict[str, Any] | None], device: torch.device) -> dict[str, Any]:
    """What a check of correctness returns. On a GPU a failed one is `failed` in the row: times cost, and are kept."""
    if device.type != "cuda":
        return check() or {}
    try:
        return check() or {}
    except AssertionError as error:
        return {"failed": str(error).strip().splitlines()[0] if str(error).strip() else "an assertion of the check"}


def ended(rows: Sequence[dict[str, Any]]) -> int:
    """The exit code: 1 where a row has `failed`, which is printed."""
    failed = {(r["op"], r["shape"], r["dtype"]): r["failed"] for r in rows if "failed" in r}
    for (op, shape, dtype), said in failed.items():
        print(f"FAILED {op} {shape} {dtype}: {said}")
    return 1 if failed else 0


def row(
    op: str,
    shape: str,
    dtype: str,
    baseline: str,
    times: Sequence[float],
    baseline_times: Sequence[float],
    *,
    read_bytes: float = 0,
    flops: float = 0,
    floor: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One flat row: medians, the ratios of the interleaved pairs, and the rates where bytes or flops are given.

    `floor`: the least time that the roofline model gives the op on this GPU, in seconds.
    """
    ratios = [b / a for a, b in zip(times, baseline_times, strict=True)]
    median = statistics.median(times)
    if floor is not None:
        more |= {"model_seconds": floor, "over_model": median / floor}
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "baseline": baseline,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_median": statistics.median(ratios),
        "ratio_max": max(ratios),
        "seconds": median,
        "seconds_min": min(times),
        "baseline_seconds": statistics.median(baseline_times),
        "baseline_seconds_min": min(baseline_times),
        "gbs": read_bytes / median / 1e9 if read_bytes else None,
        "gflops": flops / median / 1e9 if flops else None,
    } | more


def read_rate(nbytes: int, repeats: int = 7, device: torch.device = CPU) -> float:
    """GB/s of a plain read of `nbytes` with all threads (a float32 sum), best of `repeats` cold runs."""
    data = torch.ones(nbytes // 4, device=device)
    data.sum()
    return nbytes / min(seconds(data.sum, device) for _ in range(repeats)) / 1e9


def matmul_rate(dtype: torch.dtype, size: int = 1536, repeats: int = 5, device: torch.device = CPU) -> float:
    """GFLOP/s of torch's matrix product with all threads, best of `repeats`."""
    a = torch.randn(size, size, dtype=dtype, device=device)
    torch.mm(a, a)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, a), device) for _ in range(repeats)) / 1e9


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that most benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="tiny shapes: does it run? (the figures mean nothing)")
    result.add_argument("--models", nargs="*", help="names from shapes.py; default: the target shape and SmolLM2")
    result.add_argument("--repeats", type=int, default=7)
    result.add_argument("--json", type=Path, help="write rows and meta to this file")
    return result


def op_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every op's benchmark has; `device_of` reads `--device`."""
    result = parser(description)
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the op runs; default: cpu")
    return result


def show(rows: Sequence[dict[str, Any]], device: torch.device = CPU) -> None:
    """Print the rows; beside the times of a GPU that the roofline model knows, its floors."""
    digits = 4 if device.type == "cuda" else 2
    floors = any("model_seconds" in r for r in rows)
    table = Table()
    for column in ("op", "shape", "dtype", "baseline", "ms", "baseline ms", "ratio min / median / max", "rate"):
        table.add_column(column)
    if floors:
        table.add_column("floor ms (model)")
    for r in rows:
        rate = f"{r['gbs']:.1f} GB/s" if r["gbs"] else f"{r['gflops']:.0f} GFLOP/s" if r["gflops"] else ""
        ratios = f"{r['ratio_min']:.2f} / {r['ratio_median']:.2f} / {r['ratio_max']:.2f}"
        cells = (r["op"], r["shape"], r["dtype"], r["baseline"])
        times = (f"{r[key] * 1e3:.{digits}f}" for key in ("seconds", "baseline_seconds"))
        floor = [f"{r['model_seconds'] * 1e3:.{digits}f}" if "model_seconds" in r else ""] if floors else []
        table.add_row(*cells, *times, ratios, rate, *floor)
    Console(width=150).print(table)
