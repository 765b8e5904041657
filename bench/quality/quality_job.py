"""One cell of the quality grid in a process of its own, so that its seconds and its peak memory are its own.

    python -m bench.quality.quality_job '{"scheme": "whiten", "allocator": "uniform", "remove": 0.2, ...}' OUT.json

Run by bench_quality.py, which says what the keys mean.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import unirank
from bench.quality.quality_grid import moments_of
from bench.quality.recipes import RECIPES
from unirank.analysis.scheme import scheme as scheme_of
from unirank.disk.files import write_json
from unirank.disk.hashing import sha256_text
from unirank.planning.allocator import allocator as allocator_of
from unirank.planning.measuring import make_workbench
from unirank.recipes import Preset, preset

# What a kept step depends on beside its recipe.
_SAME = ("model", "calibration", "windows", "window", "seed", "clip", "shrink", "remove", "form")


def _now() -> float:
    """Seconds; of one thread its processor's, so that other work on the machine does not count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _heal(compressed: Any, calibration: Any, settings: Any, dense: Any) -> Any:
    with tempfile.TemporaryDirectory() as work:
        return unirank.heal(compressed, calibration, settings, work=work, against=dense)


class _Kept:
    """Checkpoints of long steps, which other cells begin with too, and what they took.

    `best` is below `healed`, and `healed` below `distilled`.
    """

    def __init__(self, folder: Path, same: list[Any], seconds: dict[str, float]) -> None:
        self._folder, self._same, self._seconds, self.peak = folder, same, seconds, 0.0

    def get(self, stage: str, recipe: list[Any], make: Callable[[], Any]) -> Any:
        """The model after the stage: made, or opened where another cell made it. `recipe` is all that led to it."""
        identity = json.dumps([self._same, stage, recipe], default=dataclasses.asdict)
        place = self._folder / f"{stage}-{sha256_text(identity)[:16]}"
        note = place.with_suffix(".json")
        if not note.is_file():
            start = _now()
            made = make()
            took = {"seconds": _now() - start, "peak_mib": _peak()}
            made.save(place, overwrite=True)
            write_json(note, took)
        took = json.loads(note.read_text())
        self._seconds[stage], self.peak = took["seconds"], max(self.peak, took["peak_mib"])
        return unirank.open_compressed(place, device="cpu")


def main() -> None:
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    seconds: dict[str, float] = {}

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        start = _now()
        result = run()
        seconds[stage] = _now() - start
        return result

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "gradients" and done == total:  # the stage before anything else
            seconds["gradients"] = _now() - started

    dense = job["allocator"] == "dense"
    if job["preset"] in RECIPES:
        recipe = RECIPES[job["preset"]]
    elif job["preset"]:
        recipe = preset(job["preset"])
    else:
        recipe = Preset(job["scheme"], "uniform" if dense else job["allocator"])
    needs_gradients = recipe.needs_gradients or scheme_of(recipe.scheme).needs_gradient
    calibration = unirank.Calibration(
        text=job["calibration"],
        windows=job["windows"],
        window=job["window"],
        seed=job["seed"],
        gradient_windows=job["windows"] if needs_gradients else 0,
        clip=job["clip"],
        shrink=job.get("shrink", 0.0),
    )
    loaded = unirank.load(job["model"], dtype="float32", device="cpu")
    measured: Any = loaded.model
    record: dict[str, Any] = {"scheme": recipe.scheme, "allocator": "dense" if dense else recipe.allocator}
    if dense:
        total = sum(spec.params for spec in loaded.linears)
        record |= {"store": "", "gradients": "", "used": total, "budget": total}
    else:
        kind = f"{'gradients' if needs_gradients else 'plain'}-{job['seed']}"
        kind += moments_of(job).replace(", ", "-").replace(" ", "-")
        store = Path(job["stores"]) / f"{recipe.scheme}-{kind}"
        stores = sorted(store.parent.glob(f"*-{kind}"))
        donor = next((path for path in stores if needs_gradients and unirank.open_store(path).complete), None)
        started = _now()
        analysis = timed(
            "analyze",
            lambda: unirank.analyze(
                loaded,
                store,
                scheme=recipe.scheme,
                calibration=calibration,
                gradients_from=donor,
                progress=progress,
            ),
        )
        # Gradients that are there already, or are another store's, take no time here.
        seconds["gradients"] = 0.0 if not needs_gradients or donor is not None else seconds["gradients"]
        seconds["analyze"] -= seconds["gradients"]
        rule = allocator_of(recipe.allocator)
        workbench = make_workbench(loaded, analysis, text=job["calibration"])
        ranks = timed(
            "plan",
            lambda: unirank.plan(
                analysis,
                job["remove"],
                allocator=recipe.allocator,
                settings=recipe.settings,
                options=recipe.options,
                workbench=workbench if rule.measures else None,
                form=job["form"],
                multiple_of=1,  # the papers' accounting, for every row; presets round (docs/experiments.md)
            ),
        )
        windows = workbench.windows
        steps = _Kept(Path(job["stores"]), [job.get(key, 0.0) for key in _SAME], seconds)
        made_by = [recipe.scheme, recipe.allocator, dict(recipe.options), recipe.refine]

        def fit() -> Any:
            return unirank.apply(
                loaded, analysis, ranks, refine=recipe.refine, windows=windows, copy=recipe.heal is not None
            )

        # Truncation alone takes seconds, and is not kept.
        compressed = timed("apply", fit) if recipe.refine is None else steps.get("apply", made_by, fit)
        if recipe.heal is not None:
            layers = dataclasses.replace(recipe.heal, distill_steps=0)
            compressed = steps.get("heal", [*made_by, layers], lambda: _heal(compressed, calibration, layers, loaded))
            if recipe.heal.distill_steps:
                whole = dataclasses.replace(recipe.heal, passes=0)
                compressed = timed("distill", lambda: _heal(compressed, calibration, whole, loaded))
        measured = compressed.model
        record |= {"store": store.name, "gradients": kind if needs_gradients else ""}
        record |= {"used": ranks.used, "budget": ranks.budget}
    # Peak memory of the method itself, before the evaluation adds its own.
    record |= {"peak_mib": _peak(), "threads": torch.get_num_threads()}
    if not dense:
        record["peak_mib"] = max(record["peak_mib"], steps.peak)
    texts = []
    for text in job["texts"]:
        report = unirank.evaluate(measured, loaded.tokenizer, text=text, limit=job["limit"])
        texts.append({"text": report.text, "text_sha256": report.text_sha256, "perplexity": report.perplexity})
    write_json(out, record | {"seconds": seconds, "texts": texts})


if __name__ == "__main__":
    main()
