"""How the benchmarks measure: cold caches, the baseline interleaved with the op, and this machine's own limits."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# Larger than the last-level cache of the machines at hand.
_FLUSH = 64 * 2**20


def flush() -> None:
    """Push everything out of the caches."""
    torch.ones(_FLUSH // 4).add_(1)


def seconds(run: Callable[[], object]) -> float:
    """One cold run."""
    flush()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    run: Callable[[], object], baseline: Callable[[], object], repeats: int = 7
) -> tuple[list[float], list[float]]:
    """Seconds of `run` and of `baseline`, turn by turn, so that a busy machine hurts both alike."""
    run()
    baseline()
    pairs = [(seconds(run), seconds(baseline)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


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
    **more: Any,
) -> dict[str, Any]:
    """One flat row: medians, the ratios of the interleaved pairs, and the rates where bytes or flops are given."""
    ratios = [b / a for a, b in zip(times, baseline_times, strict=True)]
    median = statistics.median(times)
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


def read_rate(nbytes: int, repeats: int = 7) -> float:
    """GB/s of a plain read of `nbytes` with all threads (a float32 sum), best of `repeats` cold runs."""
    data = torch.ones(nbytes // 4)
    data.sum()
    return nbytes / min(seconds(data.sum) for _ in range(repeats)) / 1e9


def matmul_rate(dtype: torch.dtype, size: int = 1536, repeats: int = 5) -> float:
    """GFLOP/s of torch's matrix product with all threads, best of `repeats`."""
    a = torch.randn(size, size, dtype=dtype)
    torch.mm(a, a)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, a)) for _ in range(repeats)) / 1e9


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every op's benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="tiny shapes: does it run? (the figures mean nothing)")
    result.add_argument("--models", nargs="*", help="names from shapes.py; default: the target shape and SmolLM2")
    result.add_argument("--repeats", type=int, default=7)
    result.add_argument("--json", type=Path, help="write rows and meta to this file")
    return result


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table()
    for column in ("op", "shape", "dtype", "baseline", "ms", "baseline ms", "ratio min / median / max", "rate"):
        table.add_column(column)
    for r in rows:
        rate = f"{r['gbs']:.1f} GB/s" if r["gbs"] else f"{r['gflops']:.0f} GFLOP/s" if r["gflops"] else ""
        ratios = f"{r['ratio_min']:.2f} / {r['ratio_median']:.2f} / {r['ratio_max']:.2f}"
        cells = (r["op"], r["shape"], r["dtype"], r["baseline"])
        table.add_row(*cells, f"{r['seconds'] * 1e3:.2f}", f"{r['baseline_seconds'] * 1e3:.2f}", ratios, rate)
    Console(width=150).print(table)
