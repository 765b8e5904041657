"""One cell of the quality grid in a process of its own, so that its seconds and its peak memory are its own.

    python -m bench.quality.quality_job '{"scheme": "whiten", "allocator": "uniform", "remove": 0.2, ...}' OUT.json

Run by bench_quality.py, which says what the keys mean.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import unirank
from bench.quality.recipes import RECIPES
from unirank.analysis.scheme import scheme as scheme_of
from unirank.disk.files import write_json
from unirank.planning.allocator import allocator as allocator_of
from unirank.planning.measuring import make_workbench
from unirank.recipes import Preset, preset


def main() -> None:
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    seconds: dict[str, float] = {}

    def timed(stage: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[stage] = time.perf_counter() - start
        return result

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "gradients" and done == total:  # the stage before anything else
            seconds["gradients"] = time.perf_counter() - started

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
    )
    loaded = unirank.load(job["model"], dtype="float32", device="cpu")
    measured: Any = loaded.model
    record: dict[str, Any] = {"scheme": recipe.scheme, "allocator": "dense" if dense else recipe.allocator}
    if dense:
        total = sum(spec.params for spec in loaded.linears)
        record |= {"store": "", "gradients": "", "used": total, "budget": total}
    else:
        kind = f"{'gradients' if needs_gradients else 'plain'}-{job['seed']}"
        kind += f"-clip-{job['clip']:g}" if job["clip"] else ""
        store = Path(job["stores"]) / f"{recipe.scheme}-{kind}"
        stores = sorted(store.parent.glob(f"*-{kind}"))
        donor = next((path for path in stores if needs_gradients and unirank.open_store(path).complete), None)
        started = time.perf_counter()
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
            ),
        )
        heals, windows = recipe.heal, workbench.windows
        compressed = timed(
            "apply",
            lambda: unirank.apply(
                loaded, analysis, ranks, refine=recipe.refine, windows=windows, copy=heals is not None
            ),
        )
        if heals is not None:
            with tempfile.TemporaryDirectory() as work:
                compressed = timed(
                    "heal", lambda: unirank.heal(compressed, calibration, heals, work=work, against=loaded)
                )
        measured = compressed.model
        record |= {"store": store.name, "gradients": kind if needs_gradients else ""}
        record |= {"used": ranks.used, "budget": ranks.budget}
    # Peak memory of the method itself, before the evaluation adds its own.
    record["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    texts = []
    for text in job["texts"]:
        report = unirank.evaluate(measured, loaded.tokenizer, text=text, limit=job["limit"])
        texts.append({"text": report.text, "text_sha256": report.text_sha256, "perplexity": report.perplexity})
    write_json(out, record | {"seconds": seconds, "texts": texts})


if __name__ == "__main__":
    main()
