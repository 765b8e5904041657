"""The whole analysis of SmolLM2-135M against a plain PyTorch pipeline that does what SVD-LLM's procedure does.

    python -m bench.pipeline.bench_compress --json out.json
    python -m bench.pipeline.bench_compress --device cuda

Three measurements over the same tokens: the floor (a bare forward pass of the decoder, without hooks or `lm_head`),
`unirank.analyze` with the scheme `whiten`, and `baseline_pipeline`. Both results are then truncated to uniform ranks at
20 %, the ranks compared and the perplexities measured. --quick takes a random Llama of two layers instead.
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
from bench.pipeline import baseline_pipeline
from bench.support import synthetic
from bench.support.record import write_result
from bench.support.timing import device_of, row, show, synchronise
from unirank.analysis import fill_store
from unirank.text.windows import bos_of, calibration_windows, read_text, tokenize
from unirank.types import LoadedModel

REMOVE = 0.2


def floor_seconds(loaded: LoadedModel, windows: torch.Tensor, batch: int) -> float:
    """A bare forward pass of the decoder."""
    device = loaded.device
    synchronise(device)
    start = time.perf_counter()
    with torch.no_grad():
        for ids in windows.split(batch):
            loaded.model.base_model(input_ids=ids.to(device), use_cache=False)
    synchronise(device)
    return time.perf_counter() - start


def analysis(
    loaded: LoadedModel, store: Path, calibration: unirank.Calibration
) -> tuple[unirank.AnalysisStore, float, float]:
    """The store, the seconds of the whole analysis, and those of its decomposition."""
    stage: Any = fill_store
    decompose, spent = stage.decompose_layer, 0.0

    def timed(*args: Any, **more: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        result = decompose(*args, **more)
        spent += time.perf_counter() - start
        return result

    stage.decompose_layer = timed
    try:
        start = time.perf_counter()
        result = unirank.analyze(loaded, store, scheme="whiten", calibration=calibration)
        return result, time.perf_counter() - start, spent
    finally:
        stage.decompose_layer = decompose


def measure(load: Any, calibration: unirank.Calibration, held_out: dict[str, Any], folder: Path) -> list[dict]:
    """All measurements; `load()` gives a fresh model, `held_out` goes to `unirank.evaluate`."""
    loaded = load()
    tokens = tokenize(loaded.tokenizer, read_text(calibration.text), loaded.model)
    windows = calibration_windows(
        tokens,
        windows=calibration.windows,
        window=calibration.window,
        seed=calibration.seed,
        bos=bos_of(loaded.tokenizer),
    )
    floor_seconds(loaded, windows[: calibration.batch], calibration.batch)  # warms up
    floors = [floor_seconds(loaded, windows, calibration.batch)]
    store, total, decomposition = analysis(loaded, folder / "store", calibration)
    floors.append(floor_seconds(loaded, windows, calibration.batch))  # again, because the machine may be shared
    plain = baseline_pipeline.run(loaded, windows)

    plan = unirank.plan(store, REMOVE, allocator="uniform")
    ours = unirank.apply(load(), store, plan)
    perplexity = unirank.evaluate(ours.model, ours.tokenizer, **held_out).perplexity
    ranks = baseline_pipeline.truncate(loaded, plain, REMOVE)
    theirs = unirank.evaluate(loaded.model, loaded.tokenizer, **held_out).perplexity
    if ranks != dict(plan.ranks):
        raise AssertionError("the two pipelines chose different uniform ranks")

    shape, dtype = f"{loaded.source}, {calibration.windows} x {calibration.window} tokens", "float32"
    more = {"perplexity": perplexity, "baseline_perplexity": theirs, "floor_seconds": floors}
    plain_total = plain.calibrate_seconds + plain.decompose_seconds
    return [
        row("analysis", shape, dtype, "plain SVD-LLM", [total], [plain_total], **more),
        row("calibration", shape, dtype, "plain SVD-LLM", [total - decomposition], [plain.calibrate_seconds]),
        row("decomposition", shape, dtype, "plain SVD-LLM", [decomposition], [plain.decompose_seconds]),
        row("analysis", shape, dtype, "bare forward (floor)", [total] * 2, floors),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a random Llama of two layers")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=8, help="windows of 1024 tokens for the perplexity")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all of it runs; default: cpu")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    arguments = parser.parse_args(argv)
    device = device_of(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.quick:
            text = str(synthetic.text(folder))
            calibration = unirank.Calibration(text=text, windows=8, window=64, batch=4, clip=0.0, shrink=0.0)
            rows = measure(
                lambda: synthetic.llama(hidden=64, layers=2, device=device),
                calibration,
                {"text": text, "window": 64, "limit": 2},
                folder,
            )
        else:
            # Neither clipped nor shrunk, as the baseline.
            calibration = unirank.Calibration(windows=arguments.windows, window=512, clip=0.0, shrink=0.0)
            rows = measure(
                lambda: unirank.load("smollm2-135m", dtype="float32", device=str(device)),
                calibration,
                {"limit": arguments.held_out},
                folder,
            )
    show(rows, device)
    first = rows[0]
    print(f"perplexity at {REMOVE:.0%} uniform: {first['perplexity']:.3f}, baseline {first['baseline_perplexity']:.3f}")
    write_result(arguments.json, rows, device=device, seed=0, load=os.getloadavg())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
