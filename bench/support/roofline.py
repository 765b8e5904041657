"""A MODEL, not a measurement: bytes, flops and the two floors of each op on a GPU, and of the whole job.

    python -m bench.support.roofline --json out.json
    python -m bench.support.roofline --models llama-3-70b --gpus 8

The memory floor is bytes over the peak bandwidth, the compute floor flops over the dense peak of the units that run
them; the larger one is the least time. Eigensolvers stay far above it, because their tridiagonalisation is half
matrix-vector products. Peaks are the makers' figures for H100 SXM, A100 SXM 80 GB and RTX 4090.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.support.record import write_result
from bench.support.shapes import MODELS, Model


@dataclass(frozen=True)
class Device:
    """Peak rates per second: bytes of memory, flops of bf16 tensor cores, fp32 and fp64 units, bytes of the link.

    `driver_name` is what the driver calls it: other variants (PCIe, 40 GB) have other peaks.
    """

    driver_name: str
    memory: float
    bf16: float
    fp32: float
    fp64: float
    link: float  # to another GPU of the machine, one direction: NVLink, or PCIe 4.0 where there is none


DEVICES = {
    "H100": Device("NVIDIA H100 80GB HBM3", 3.35e12, 989e12, 67e12, 67e12, 450e9),
    "A100": Device("NVIDIA A100-SXM4-80GB", 2.04e12, 312e12, 19.5e12, 19.5e12, 300e9),
    "4090": Device("NVIDIA GeForce RTX 4090", 1.01e12, 165e12, 82.6e12, 1.29e12, 32e9),
}
WINDOWS, WINDOW = 256, 2048


@dataclass(frozen=True)
class Work:
    """What an op moves and computes, and on which units."""

    op: str
    bytes: float
    flops: float
    units: str

    def floors(self, device: Device) -> tuple[float, float]:
        if self.units == "link":
            return self.bytes / device.link, 0.0
        return self.bytes / device.memory, self.flops / getattr(device, self.units)

    def times(self, calls: float) -> Work:
        return replace(self, bytes=calls * self.bytes, flops=calls * self.flops)


def cosine_work(T: int, D: int, dtype: torch.dtype = torch.bfloat16) -> Work:
    """One call on two streams [T, D]."""
    return Work("cosine_accumulate_", 2 * dtype.itemsize * T * D, 6 * T * D, "fp32")


def gram_work(T: int, N: int, dtype: torch.dtype = torch.bfloat16, kept: torch.dtype = torch.float32) -> Work:
    """One call on x [T, N]; the gram of dtype `kept` is read and written."""
    return Work("gram_accumulate_", dtype.itemsize * T * N + 2 * kept.itemsize * N * N, T * N * (N + 1), _units(dtype))


def eigh_work(B: int, N: int, dtype: torch.dtype) -> Work:
    """One call on B matrices: each is read, its vectors are written."""
    return Work("batched_eigh", 2 * dtype.itemsize * B * N * N, 9 * B * N**3, _units(dtype))


def topk_work(components: int) -> Work:
    """One call: a radix sort reads and writes 16-byte pairs in 8 passes."""
    return Work("global_topk", components * 16 * 2 * 8, 0, "fp32")


def _units(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float64: "fp64"}.get(dtype, "bf16")


def gpu_floor(work: Work, device: torch.device) -> float | None:
    """The least time of `work` on this GPU; None on a CPU and on GPUs whose peaks are not listed here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((max(work.floors(d)) for d in DEVICES.values() if d.driver_name == name), None)


def works(model: Model, gpus: int = 1) -> list[Work]:
    """What one of `gpus` does of the whole job on `WINDOWS` windows: bf16 weights and streams, fp32 Grams, fp64
    decomposition. All have the weights of the layer that is at work; windows and matrices are shared out.
    """
    T, D, L = WINDOWS * WINDOW, model.hidden, model.layers
    weights = sum(m * n for m, n in model.linears)
    traffic = sum(m + n for m, n in model.linears)
    attention = 4 * T * WINDOW * model.query / 2  # causal
    components = sum(min(m, n) for m, n in model.all_linears())
    grams = [gram_work(T, n) for n in model.inputs]
    share = 1 / gpus
    # W C Wᵀ through the square part, factors, and for a tall weight its Cholesky QR.
    products = spread([2 * min(m, n) * n * n + 4 * min(m, n) ** 2 * max(m, n) for m, n in model.linears], gpus)
    eigh = spread([9 * min(m, n) ** 3 for m, n in model.linears], gpus)
    matrix_bytes = spread([8 * (3 * m * n + 4 * min(m, n) ** 2) for m, n in model.linears], gpus)
    found = [
        Work("forward", L * (2 * weights + 2 * T * traffic * share), L * (2 * T * weights + attention) * share, "bf16"),
        cosine_work(T, D).times(3 * L * share),
        Work("gram_accumulate_", L * sum(g.bytes for g in grams), L * sum(g.flops for g in grams), "bf16").times(share),
        Work("products", L * matrix_bytes, L * products, "fp64"),
        Work("batched_eigh", L * matrix_bytes, L * eigh, "fp64"),
        topk_work(components),
    ]
    if gpus > 1:
        # Sums go down the row of GPUs in parts and come back: each link carries them twice. Factors go to the first.
        moments = L * sum(4 * n * n for n in model.inputs)
        factors = sum(2 * min(m, n) * (m + n) for m, n in model.all_linears())
        found += [Work("reduce", 2 * moments, 0, "link"), Work("gather", factors * (1 - share), 0, "link")]
    return found


def spread(costs: Sequence[float], gpus: int) -> float:
    """What the GPU with the most to do gets, when the dearest go first, each to whoever has least."""
    load = [0.0] * gpus
    for cost in sorted(costs, reverse=True):
        load[load.index(min(load))] += cost
    return max(load)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="accepted like everywhere; the model is always quick")
    parser.add_argument("--models", nargs="*", default=["llama-2-7b", "llama-3-70b"])
    parser.add_argument("--gpus", type=int, default=1, help="that share the work, in one machine")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    arguments = parser.parse_args(argv)
    console = Console(width=150)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for device_name, device in DEVICES.items():
            many = f"{arguments.gpus} x " if arguments.gpus > 1 else ""
            title = f"MODEL, not a measurement: {name} on {many}{device_name}, {WINDOWS} x {WINDOW} tokens"
            table = Table("op", "GB", "TFLOP", "memory floor s", "compute floor s", "bound by", title=title)
            total = 0.0
            for work in works(MODELS[name], arguments.gpus):
                memory, compute = work.floors(device)
                total += max(memory, compute)
                bound = "link" if work.units == "link" else "memory" if memory >= compute else "compute"
                cells = (f"{work.bytes / 1e9:.1f}", f"{work.flops / 1e12:.1f}", f"{memory:.4f}", f"{compute:.4f}")
                table.add_row(work.op, *cells, bound)
                rows.append(_row(work.op, name, device_name, work.units, max(memory, compute), work, bound))
            everything = Work("whole job", 0, 0, "fp32")
            rows.append(_row("whole job", name, device_name, "mixed", total, everything, "sum of the floors"))
            table.add_row("whole job", "", "", "", f"{total:.2f}", "sum of the larger floors")
            console.print(table)
    write_result(arguments.json, rows, kind="model", windows=WINDOWS, window=WINDOW, gpus=arguments.gpus)
    return 0


def _row(op: str, shape: str, device: str, dtype: str, seconds: float, work: Work, bound: str) -> dict[str, Any]:
    """The keys of every result file; a model has no baseline and so no ratio."""
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "baseline": f"roofline model of {device}",
        "ratio": None,
        "seconds": seconds,
        "baseline_seconds": None,
        "gbs": work.bytes / seconds / 1e9,
        "gflops": work.flops / seconds / 1e9,
        "bytes": work.bytes,
        "flops": work.flops,
        "bound": bound,
        "measured": False,
    }


if __name__ == "__main__":
    raise SystemExit(main())
