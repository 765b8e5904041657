"""One analysis by 1, 2 and 4 processes: how much faster, what the sums over them cost, and whether the plans agree.

    python -m bench.pipeline.bench_processes --json processes.json

Each process computes on one thread, so as many processes as the machine has cores are the most that can help; the
baseline is one process, also on one thread. Seconds run from the first layer to the last, without Python's imports and
the loading of the model. `wait`: for the slowest process, before a sum; `reduce`: the sums themselves. Both are process
0's, and in `seconds` too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import unirank
from bench.support import synthetic
from bench.support.record import write_result
from unirank import distributed
from unirank.analysis.store import AnalysisStore, open_store
from unirank.layerwise import statistics

REMOVE = (0.2, 0.4, 0.6)
SPENT = {"wait": 0.0, "reduce": 0.0, "bytes": 0.0, "seconds": 0.0}


def timed_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`sum_in_order`, and what it took."""
    started = time.perf_counter()
    distributed.barrier()
    together = time.perf_counter()
    distributed.sum_in_order(tensor)
    SPENT["wait"] += together - started
    SPENT["reduce"] += time.perf_counter() - together
    SPENT["bytes"] += tensor.nbytes
    return tensor


def work(model: str, out: Path, calibration: unirank.Calibration) -> None:
    """What each process does: the analysis, timed, process 0's times beside the store."""
    torch.set_num_threads(1)
    statistics.sum_in_order = timed_sum
    with distributed.process_group():
        loaded = unirank.load(model, device="cpu")
        distributed.barrier()
        started = time.perf_counter()
        unirank.analyze(loaded, out, calibration=calibration)
        SPENT["seconds"] = time.perf_counter() - started
        if distributed.rank() == 0:
            out.with_suffix(".json").write_text(json.dumps(SPENT))


def processes_of(count: int, arguments: Sequence[str], out: Path) -> dict[str, float]:
    """Run this file as `count` processes; the times of process 0."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launch, "-m", "bench.pipeline.bench_processes", *arguments, "--worker", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{count} processes ended with {done.returncode}:\n{done.stderr}")
    return json.loads(out.with_suffix(".json").read_text())


def check(one: AnalysisStore, other: AnalysisStore) -> float:
    """Plans are equal; the largest relative difference of an energy, of the matrix's largest."""
    for remove in REMOVE:
        assert unirank.plan(other, remove).ranks == unirank.plan(one, remove).ranks, f"plans at {remove} differ"
    theirs = other.energies()
    return max(float((theirs[name] - energy).abs().max() / energy[0]) for name, energy in one.energies().items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="default: smollm2-135m")
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--calib", default="builtin")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="two processes and few tokens, to see that it runs")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    options: dict[str, Any] = {key: getattr(arguments, key) for key in ("windows", "window", "batch")}
    if arguments.worker is not None:
        work(arguments.model, arguments.worker, unirank.Calibration(text=arguments.calib, **options))
        return 0
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:
            arguments.processes, options = [2], {"windows": 8, "window": 64, "batch": 2}
            tiny = synthetic.llama(hidden=64, layers=2)
            for part in (tiny.model, tiny.tokenizer):
                part.save_pretrained(Path(scratch) / "tiny")
            arguments.model, arguments.calib = str(Path(scratch) / "tiny"), str(synthetic.text(Path(scratch)))
        given = ["--model", arguments.model, "--calib", arguments.calib]
        given += [part for key, value in options.items() for part in (f"--{key}", str(value))]
        alone = processes_of(1, given, Path(scratch) / "1")
        for count in arguments.processes:
            spent = processes_of(count, given, Path(scratch) / str(count))
            row: dict[str, Any] = {"op": "analyze", "shape": f"{arguments.model}, {count} processes"}
            row |= {"dtype": "float32", "processes": count, **options, "cores": os.cpu_count()}
            row |= {"baseline": "1 process", "ratio": alone["seconds"] / spent["seconds"], "seconds": spent["seconds"]}
            row |= {"baseline_seconds": alone["seconds"], "gbs": None, "gflops": None}
            row |= {"wait_share": spent["wait"] / spent["seconds"], "reduce_share": spent["reduce"] / spent["seconds"]}
            row |= {"reduced_bytes": spent["bytes"]}
            row |= {"difference": check(*(open_store(Path(scratch) / str(n)) for n in (1, count)))}
            rows.append(row)
    Console().print(rows)
    write_result(arguments.json, rows, seed=0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
