"""A MODEL, not a measurement: the least time of each op on a GPU, and what the whole job is counted to take.

    python -m bench.support.roofline --json out.json
    python -m bench.support.roofline --models llama-3-70b --gpus 8
    python -m bench.support.roofline --pages

Of an op: the memory floor is bytes over the peak bandwidth, the compute floor flops over the dense peak of the units
that run them; the larger one is the least time. Eigensolvers stay far above it, because their tridiagonalisation is
half matrix-vector products. Of the job (`job_model`): stages at the shares of the peaks that real work gets, with
published rates for eigenproblems, and copies, hashes and the disk. Nothing has run on any of these GPUs.
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

from bench.support.devices import DEVICES, Device
from bench.support.job_model import AFTER, BEFORE, GOAL, WINDOW, WINDOWS, Stage, stages, total
from bench.support.record import write_result
from bench.support.shapes import MODELS


@dataclass(frozen=True)
class Work:
    """What an op moves and computes, and on which units."""

    op: str
    bytes: float
    flops: float
    units: str

    def floors(self, device: Device) -> tuple[float, float]:
        return self.bytes / device.memory, self.flops / getattr(device, self.units)


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="accepted like everywhere; the model is always quick")
    parser.add_argument("--models", nargs="*", default=["llama-2-7b", "llama-3-70b"])
    parser.add_argument("--devices", nargs="*", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--gpus", type=int, default=1, help="that share the work, in one machine")
    parser.add_argument("--pages", action="store_true", help="print the tables of docs/large-models.md instead")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    arguments = parser.parse_args(argv)
    if arguments.pages:
        print(pages(), end="")
        return 0
    console = Console(width=150)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for device_name in arguments.devices:
            rows += _show(console, name, device_name, arguments.gpus)
    write_result(arguments.json, rows, kind="model", windows=WINDOWS, window=WINDOW, gpus=arguments.gpus)
    return 0


def _show(console: Console, model: str, device: str, gpus: int) -> list[dict[str, Any]]:
    many = f"{gpus} x " if gpus > 1 else ""
    title = f"MODEL, not a measurement: {model} on {many}{device}, {WINDOWS} x {WINDOW} tokens"
    table = Table("stage", "before, s", "after, s", "who", title=title)
    old, new = (_by_name(model, device, gpus, before=before) for before in (True, False))
    rows = []
    for name in dict.fromkeys((*old, *new)):
        cells = [_cell(found[name].seconds) if name in found else "0" for found in (old, new)]
        table.add_row(name, *cells, (new if name in new else old)[name].lane)
        rows += [_row(name, model, device, found[name].seconds, when) for found, when in _named(old, new, name)]
    sums = [total(list(found.values())) for found in (old, new)]
    goal = f"; the goal of a 7B model on an H100 is {GOAL:.0f} s"
    table.add_row("sum", *map(_cell, sums), f"the disk runs beside the rest{goal}")
    best = total(list(new.values()), beside=True)
    table.add_row("where overlap hides all it can", "", _cell(best), "")
    console.print(table)
    rows += [_row("sum", model, device, seconds, when) for seconds, when in zip(sums, ("before", "after"), strict=True)]
    return [*rows, _row("sum, overlapped", model, device, best, "after")]


def _by_name(model: str, device: str, gpus: int, *, before: bool) -> dict[str, Stage]:
    found = stages(MODELS[model], DEVICES[device], BEFORE if before else AFTER, gpus)
    return {stage.name: stage for stage in found}


def _named(old: dict[str, Stage], new: dict[str, Stage], name: str) -> list[tuple[dict[str, Stage], str]]:
    return [(found, when) for found, when in ((old, "before"), (new, "after")) if name in found]


def _cell(seconds: tuple[float, float]) -> str:
    """A range, in as many digits as mean something."""
    shown = [f"{value:.1f}" if value < 9.95 else f"{value:.0f}" for value in seconds]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def pages() -> str:
    """The tables of docs/large-models.md, as Markdown; a test compares them with the page."""
    return "\n".join(
        (_before_and_after("llama-2-7b", "H100"), _by_device("llama-2-7b"), _by_gpus("llama-3-70b", "H100"))
    )


def _before_and_after(model: str, device: str) -> str:
    old, new = (_by_name(model, device, 1, before=before) for before in (True, False))
    lines = ["| stage | before | now |", "|---|---|---|"]
    for name in dict.fromkeys((*old, *new)):
        cells = [f"{_cell(found[name].seconds)} s" if name in found else "0" for found in (old, new)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sums = [_cell(total(list(found.values()))) for found in (old, new)]
    lines.append(f"| whole analysis, no overlap on the GPU | {' s | '.join(sums)} s |")
    lines.append(f"| the same, overlap hides all it can | | {_cell(total(list(new.values()), beside=True))} s |")
    return "\n".join(lines) + "\n"


def _by_device(model: str) -> str:
    """The parts of the work on a GPU; the decomposition also in float32."""
    titles = ("GPU", "forward, Gram, cosines, copies", "decomposition", "in float32", "whole analysis")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, device in DEVICES.items():
        found, short = (stages(MODELS[model], device, changes) for changes in (AFTER, replace(AFTER, units="fp32")))
        calibrates, decomposes, in_short = (
            _sum([stage for stage in which if stage.lane == lane])
            for which, lane in ((found, "calibrates"), (found, "decomposes"), (short, "decomposes"))
        )
        lines.append(f"| {name} | {' s | '.join(map(_cell, (calibrates, decomposes, in_short, total(found))))} s |")
    return "\n".join(lines) + "\n"


def _by_gpus(model: str, device: str) -> str:
    one, eight = (_by_name(model, device, gpus, before=False) for gpus in (1, 8))
    lines = [f"| stage | 1 x {device} | 8 x {device} |", "|---|---|---|"]
    for name in dict.fromkeys((*one, *eight)):
        cells = [f"{_cell(found[name].seconds)} s" if name in found else "" for found in (one, eight)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sums = [_cell(total(list(found.values()))) for found in (one, eight)]
    lines.append(f"| whole analysis, no overlap on the GPU | {' s | '.join(sums)} s |")
    return "\n".join(lines) + "\n"


def _sum(found: Sequence[Stage]) -> tuple[float, float]:
    return sum(stage.seconds[0] for stage in found), sum(stage.seconds[1] for stage in found)


def _row(stage: str, model: str, device: str, seconds: tuple[float, float], when: str) -> dict[str, Any]:
    """The keys of every result file; a model has no baseline and so no ratio."""
    return {
        "op": stage,
        "shape": model,
        "dtype": "mixed",
        "when": when,
        "baseline": f"model of {device}",
        "ratio": None,
        "seconds": seconds[0],
        "seconds_max": seconds[1],
        "baseline_seconds": None,
        "gbs": None,
        "gflops": None,
        "measured": False,
    }


if __name__ == "__main__":
    raise SystemExit(main())
