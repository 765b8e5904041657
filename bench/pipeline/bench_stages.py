"""What each stage of a preset costs, in bare forward passes over the same calibration tokens.

    python -m bench.pipeline.bench_stages --json out.json
    python -m bench.pipeline.bench_stages --stages measuring in-plan --windows 16

A bare forward pass is the decoder and the head, under no_grad, over all calibration windows (64 of 512 tokens), in
batches of the calibration's size, with the same threads. It is timed over an eighth of the windows before and after
every stage, because a machine may be shared; `forwards` is the stage over the mean of both, and `target` what is wanted
where something is. SmolLM2-135M; --quick takes a random Llama of two layers instead.

First it is checked that what is timed is right: a divergence that was measured is that of logits of the whole model in
float64, every plan fits its budget, and the dense model is left as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import unirank
from bench.support import synthetic
from bench.support.record import write_result
from bench.support.timing import row
from unirank.disk.hashing import sha256_tensors
from unirank.planning.allocator.base import Workbench
from unirank.planning.allocator.measure import low_rank_of, replaced
from unirank.recipes import preset
from unirank.text.windows import bos_of, calibration_windows, read_text, tokenize
from unirank.types import LoadedModel

REMOVE = 0.4
STAGES = ("analysis", "gradients", "measuring", "depth", "in-plan", "swaps", "second-pass", "heal")
TARGETS = {"measuring": 3.0}
SHARE = 8  # of the windows, one in so many is run to time a bare forward pass


@dataclass
class Bench:
    """The model, its calibration, and what was timed."""

    loaded: LoadedModel
    calibration: unirank.Calibration
    folder: Path
    trials: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    windows: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def bare(self) -> float:
        """Seconds of a bare forward pass over all windows, from a share of them."""
        part = self.windows[: max(1, len(self.windows) // SHARE)]
        start = time.perf_counter()
        with torch.no_grad():
            for ids in part.split(self.calibration.batch):
                self.loaded.model(input_ids=ids, use_cache=False)
        return (time.perf_counter() - start) * len(self.windows) / len(part)

    def timed(self, stage: str, run: Callable[[], Any]) -> Any:
        """Run it, and keep its row."""
        before = self.bare()
        start = time.perf_counter()
        result = run()
        spent = time.perf_counter() - start
        bare = (before + self.bare()) / 2
        shape = f"{self.loaded.source}, {len(self.windows)} x {self.windows.shape[1]} tokens"
        more = {"forwards": spent / bare, "target": TARGETS.get(stage)}
        self.rows.append(row(stage, shape, "float32", "bare forward, decoder and head", [spent], [bare], **more))
        return result


def check_measuring(workbench: Workbench, store: unirank.AnalysisStore, divergences: dict[str, float]) -> None:
    """Raise AssertionError unless the divergence of one linear is that of the whole model's logits, in float64."""
    loaded, windows = workbench.loaded, workbench.windows[:2, :256]
    spec = store.linears[len(store.linears) // 2]
    rank = max(1, int(0.1 * spec.params / spec.cost))
    low = low_rank_of(store, spec, loaded.model.get_submodule(spec.name), rank)
    with torch.no_grad():
        dense = loaded.model(input_ids=windows).logits.double().log_softmax(-1)
        with replaced(loaded.model, {spec.name: low}):
            other = loaded.model(input_ids=windows).logits.double().log_softmax(-1)
    expected = float((dense.exp() * (dense - other)).sum(-1).mean())
    if abs(divergences[spec.name] - expected) > 1e-3 * expected + 1e-7:
        raise AssertionError(f"{spec.name}: measured {divergences[spec.name]}, whole model {expected}")


def measure(bench: Bench, stages: Sequence[str]) -> None:
    """All stages that are asked for, in the order of a preset; those before them run too."""
    loaded, folder = bench.loaded, bench.folder
    tokens = tokenize(loaded.tokenizer, read_text(bench.calibration.text), loaded.model)
    bench.windows = calibration_windows(
        tokens,
        windows=bench.calibration.windows,
        window=bench.calibration.window,
        seed=bench.calibration.seed,
        bos=bos_of(loaded.tokenizer),
    )
    bench.bare()  # warms up
    found = sha256_tensors(sorted(loaded.model.state_dict().items()))
    recipe = preset("fast")

    def analyze() -> unirank.AnalysisStore:
        return unirank.analyze(loaded, folder / "store", scheme=recipe.scheme, calibration=bench.calibration)

    store = bench.timed("analysis", analyze) if "analysis" in stages else analyze()
    if "gradients" in stages:  # what `best` runs more than `fast`: the backward pass over as many windows
        bench.timed("gradients", lambda: _gradients(bench))
    workbench = unirank.make_workbench(loaded, store, text=bench.calibration.text)

    def plan(**options: float) -> unirank.RankPlan:
        arguments: dict[str, Any] = {"allocator": "lems", "form": recipe.form, "workbench": workbench}
        made = unirank.plan(store, REMOVE, options=options, **arguments)
        if made.used > made.budget:
            raise AssertionError(f"the plan uses {made.used} of {made.budget}")
        return made

    base = bench.timed("measuring", plan) if {"measuring", "depth", "in-plan", "swaps"} & {*stages} else plan()
    check_measuring(workbench, store, base.settings["kl"])
    for stage, options in (("depth", {"depth": 10}), ("in-plan", {"rounds": 1}), ("swaps", {"swaps": bench.trials})):
        if stage in stages:
            bench.timed(stage, lambda options=options: plan(**options))
    if sha256_tensors(sorted(loaded.model.state_dict().items())) != found:
        raise AssertionError("planning changed the model")
    if {"second-pass", "heal"} & {*stages}:
        compressed = bench.timed(
            "second-pass",
            lambda: unirank.apply(loaded, store, base, refine=recipe.refine, windows=workbench.windows, copy=True),
        )
        if "heal" in stages:
            work = folder / "work"
            bench.timed("heal", lambda: unirank.heal(compressed, bench.calibration, against=loaded, work=work))


def _gradients(bench: Bench) -> None:
    """The passes of an analysis up to the end of its gradients; its decomposition is not timed here."""
    calibration = dataclasses.replace(bench.calibration, gradient_windows=bench.calibration.windows)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "gradients" and done == total:
            raise _StageIsOverError

    with suppress(_StageIsOverError):
        unirank.analyze(bench.loaded, bench.folder / "kfac", scheme="kfac", calibration=calibration, progress=stop)


class _StageIsOverError(Exception):
    """The stage is over."""


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("stage", "seconds", "bare forward", "bare forwards", "wanted")
    for entry in rows:
        wanted = f"at most {entry['target']:g}" if entry["target"] else ""
        cells = f"{entry['seconds']:.2f}", f"{entry['baseline_seconds']:.2f}", f"{entry['forwards']:.2f}"
        table.add_row(entry["op"], *cells, wanted)
    Console(width=100).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a random Llama of two layers")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--swaps", type=int, default=200, help="swaps that are tried")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.quick:
            text = str(synthetic.text(folder))
            calibration = unirank.Calibration(text=text, windows=8, window=64, batch=4)
            bench = Bench(synthetic.llama(hidden=64, layers=2), calibration, folder, trials=5)
        else:
            calibration = unirank.Calibration(windows=arguments.windows, window=512)
            loaded = unirank.load("smollm2-135m", dtype="float32", device="cpu")
            bench = Bench(loaded, calibration, folder, trials=arguments.swaps)
        measure(bench, arguments.stages)
    show(bench.rows)
    write_result(arguments.json, bench.rows, device=torch.device("cpu"), seed=0, load=os.getloadavg())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
