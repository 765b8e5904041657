"""What healing costs, as a multiple of a bare forward pass over the same tokens, and what a step's batch does to it.

    python -m bench.pipeline.bench_heal --layers 3 --windows 20 --json out.json

The first layers of SmolLM2-135M, `whiten` at uniform ranks, 40 % removed; calibrated and healed on Python's
documentation. The bare forward pass is that of the dense decoder, without `lm_head`. --quick takes a random Llama of
two layers instead.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import unirank
from bench.pipeline.bench_compress import floor_seconds
from bench.support import synthetic
from bench.support.record import write_result
from bench.support.timing import row, show
from unirank.finetuning.healing_text import draw
from unirank.types import LoadedModel

REMOVE = 0.4


def first_layers(loaded: LoadedModel, count: int) -> LoadedModel:
    """The model with its first `count` decoder layers."""
    layers: Any = loaded.model.get_submodule(loaded.layers)
    del layers[count:]
    loaded.model.config.num_hidden_layers = len(layers)
    return unirank.describe(loaded.model, loaded.tokenizer, source=f"{loaded.source}, {len(layers)} layers")


def measure(
    loaded: LoadedModel, calibration: unirank.Calibration, batches: Sequence[int], folder: Path
) -> list[dict[str, Any]]:
    """A row for each number of windows a step."""
    store = unirank.analyze(loaded, folder / "store", calibration=calibration)
    plan = unirank.plan(store, REMOVE, allocator="uniform")
    drawn = draw(loaded, calibration, None, unirank.Heal().held_out)
    windows = torch.cat([drawn.train, *drawn.looks])
    rows = []
    for batch in batches:
        compressed = unirank.apply(loaded, store, plan, copy=True)
        floor_seconds(loaded, windows[:batch], batch)  # warms up
        floors = [floor_seconds(loaded, windows, batch)]
        start = time.perf_counter()
        work = folder / f"work-{batch}"
        healed = unirank.heal(compressed, calibration, unirank.Heal(batch=batch), against=loaded, work=work)
        spent = time.perf_counter() - start
        floors.append(floor_seconds(loaded, windows, batch))  # again, because the machine may be shared
        layers = (healed.training or {})["layers"]
        errors = {f"error_{when}": sum(layer[when] for layer in layers) / len(layers) for when in ("before", "after")}
        shape = f"{loaded.source}, {len(windows)} x {windows.shape[1]} tokens, {batch} windows a step"
        more = errors | {"forward_passes": 2 * spent / sum(floors)}
        rows.append(row("heal", shape, "float32", "bare forward (floor)", [spent] * 2, floors, **more))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a random Llama of two layers")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="windows a step")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.quick:
            calibration = unirank.Calibration(str(synthetic.text(folder)), windows=8, window=64, batch=4)
            rows = measure(synthetic.llama(hidden=64, layers=2), calibration, [4], folder)
        else:
            loaded = unirank.load("smollm2-135m", dtype="float32", device="cpu")
            calibration = unirank.Calibration(windows=arguments.windows)
            rows = measure(first_layers(loaded, arguments.layers), calibration, arguments.batches, folder)
    show(rows)
    for one in rows:
        print(
            f"{one['shape']}: {one['forward_passes']:.1f} forward passes, "
            f"mean held-out error of a layer {one['error_before']:.4f} before, {one['error_after']:.4f} after"
        )
    write_result(arguments.json, rows, seed=0, load=os.getloadavg())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
