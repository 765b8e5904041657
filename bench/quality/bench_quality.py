"""Quality at equal budget: perplexity of each way to allocate ranks, on one analysis.

    python -m bench.quality.bench_quality --protocol reference

reruns the `whiten` rows of the method's reference table (SmolLM2-135M-Instruct in float32; 64 windows of 512 tokens of
WikiText-2's validation text, seed 0; perplexity on the first 8 windows of 1024 tokens of its test text), prints each
beside the reference figure, and compares the sublayer cosines. It exits with 1 when a figure is off by more than 2 %.

    python -m bench.quality.bench_quality --preset fast best --json presets.json
    python -m bench.quality.bench_quality --grid --remove 0.2 0.4 0.6 --json docs/results.json \\
        --markdown docs/results.md
    python -m bench.quality.bench_quality --preset unirank fast --clip 2 --json clipped.json
    python -m bench.quality.bench_quality --experiments --json docs/results.json --markdown docs/results.md
    python -m bench.quality.bench_quality --parts --clip 2 --json docs/results.json --markdown docs/results.md

runs presets, or every scheme, allocator and preset, or what was tried on the way to the presets, on the same
calibration; a second text is Python's documentation. What the JSON file has already is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import unirank
from bench.quality import quality_grid
from bench.quality.recipes import PARTS, RECIPES
from bench.support.record import write_result
from unirank import Calibration, ScoreSettings, apply, load, plan
from unirank.analysis.store import AnalysisStore
from unirank.disk.files import write_text
from unirank.disk.hashing import sha256_text
from unirank.display import display
from unirank.evaluation.perplexity import evaluate
from unirank.models.embedded import NAME
from unirank.recipes import presets
from unirank.types import FORMS


@dataclass(frozen=True)
class Row:
    """One way to allocate, and its reference perplexities by removed fraction."""

    label: str
    allocator: str
    reference: dict[float, float]
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    clip: float = 0.0  # the method's own figures are without clipping, whatever the default is


DENSE_REFERENCE = 29.18
REFERENCE = (
    Row("uniform", "uniform", {0.2: 129.9, 0.4: 534.6}),
    Row("unirank, sublayer", "unirank", {0.2: 68.9, 0.4: 325.4}),
    Row("uniform, clip 2", "uniform", {0.2: 128.99, 0.4: 537.2}, clip=2.0),
    Row("unirank, sublayer, clip 2", "unirank", {0.2: 60.14, 0.4: 240.1}, clip=2.0),
    Row("unirank, block", "unirank", {0.2: 78.6, 0.4: 407.7}, ScoreSettings(importance="block")),
    Row("unirank, per parameter", "unirank", {0.2: 78.5, 0.4: 316.6}, ScoreSettings(per_parameter=True)),
    Row("unirank, I^0.5", "unirank", {0.2: 82.4, 0.4: 373.8}, ScoreSettings(gamma=0.5)),
    Row("local energy ratio only", "unirank", {0.2: 119.6, 0.4: 969.0}, ScoreSettings(importance="none")),
    Row(
        "local ratio, sigma",
        "unirank",
        {0.2: 132.8, 0.4: 919.0},
        ScoreSettings(importance="none", local="sigma"),
    ),
    Row(
        "absolute energy per parameter",
        "unirank",
        {0.2: 1137.0, 0.4: 11531.0},
        ScoreSettings(importance="none", local="absolute", per_parameter=True),
    ),
)
# (layer, sublayer) -> cosine to four digits
COSINES = {
    (0, "attention"): 0.6392,
    (0, "mlp"): 0.0571,
    (1, "attention"): 0.8627,
    (1, "mlp"): 0.9624,
    (12, "attention"): 0.9891,
    (12, "mlp"): 0.9781,
    (24, "attention"): 0.8740,
    (24, "mlp"): 0.9711,
    (29, "attention"): 0.9897,
    (29, "mlp"): 0.7692,
}
TOLERANCE = 0.02
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2"


def reference(data: Path, store_path: Path, console: Console) -> tuple[list[dict[str, Any]], AnalysisStore]:
    """Run the protocol; one flat row per allocation and removed fraction, dense first."""
    test = str(data / "wiki.test.raw")
    rows = []
    with display(None if console.is_terminal else False, console=console) as progress:
        loaded = load(NAME, dtype="float32", device="cpu")
        start = time.perf_counter()
        stores = {}
        for clip in dict.fromkeys(row.clip for row in REFERENCE):
            text = str(data / "wiki.valid.txt")
            calibration = Calibration(text=text, windows=64, window=512, seed=0, clip=clip, shrink=0)
            place = store_path.with_name(f"{store_path.name}-clip-{clip:g}") if clip else store_path
            stores[clip] = unirank.analyze(loaded, place, calibration=calibration, progress=progress)
        console.print(f"analyses: {time.perf_counter() - start:.1f} s")
        jobs = [(None, 0.0), *((row, remove) for remove in (0.2, 0.4) for row in REFERENCE)]
        for row, remove in jobs:
            start = time.perf_counter()
            used = budget = sum(spec.params for spec in loaded.linears)
            if row is not None:
                store = stores[row.clip]
                ranks = plan(store, remove, allocator=row.allocator, settings=row.settings)
                used, budget = ranks.used, ranks.budget
                loaded = load(NAME, dtype="float32", device="cpu")
                apply(loaded, store, ranks)
            label = row.label if row else "dense"
            report = evaluate(
                loaded.model, loaded.tokenizer, text=test, limit=8, stage=f"{label} {remove:.0%}", progress=progress
            )
            rows.append(
                {
                    "model": NAME,
                    "scheme": "whiten" if row else "-",
                    "allocator": row.allocator if row else "dense",
                    "row": label,
                    "remove": remove,
                    "clip": row.clip if row else 0.0,
                    "text": report.text,
                    "text_sha256": report.text_sha256,
                    "perplexity": report.perplexity,
                    "reference": row.reference[remove] if row else DENSE_REFERENCE,
                    "used": used,
                    "budget": budget,
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows, stores[0.0]


def show(rows: list[dict[str, Any]], store: AnalysisStore, console: Console) -> bool:
    """Print both tables; True when every figure is within the tolerance."""
    table = Table(title="perplexity, WikiText-2 test, 8 windows of 1024", title_justify="left")
    for column in ("row", "remove", "perplexity", "reference", "difference", "used", "budget"):
        table.add_column(column, justify="left" if column == "row" else "right")
    good = True
    for row in rows:
        difference = row["perplexity"] / row["reference"] - 1
        good &= abs(difference) <= TOLERANCE
        table.add_row(
            row["row"],
            f"{row['remove']:.0%}",
            f"{row['perplexity']:.2f}",
            f"{row['reference']:g}",
            f"{difference:+.2%}" + ("" if abs(difference) <= TOLERANCE else " !"),
            f"{row['used']:,}",
            f"{row['budget']:,}",
        )
    console.print(table)
    cosines = Table(title="sublayer cosines", title_justify="left")
    for column in ("layer", "sublayer", "measured", "reference"):
        cosines.add_column(column, justify="right")
    measured = store.cosines()
    for (layer, sublayer), figure in COSINES.items():
        value = measured[layer][sublayer].mean
        good &= abs(value - figure) <= 0.005
        cosines.add_row(str(layer), sublayer, f"{value:.4f}", f"{figure:.4f}")
    console.print(cosines)
    return good


def grid(arguments: argparse.Namespace, console: Console) -> int:
    """Run presets, experiments or everything; resumes from the JSON file."""
    tried = PARTS if arguments.parts else RECIPES.keys() - PARTS.keys()
    names, all_schemes, all_allocators = arguments.preset or sorted(tried), (), ()
    if arguments.grid:
        names, all_schemes, all_allocators = quality_grid.everything()
    seeds = range(arguments.seeds)
    options = {"clip": arguments.clip, "shrink": arguments.shrink, "form": arguments.form}
    jobs = list(quality_grid.cells(names, all_schemes, all_allocators, arguments.remove, seeds, **options))
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.json or Path(scratch) / "grid.json"
        rows = quality_grid.run(
            arguments.data,
            arguments.work or Path(scratch) / "work",
            out,
            jobs,
            console,
            windows=arguments.windows,
            limit=arguments.limit,
        )
        text = quality_grid.markdown(rows, json.loads(out.read_text())["meta"])
    if arguments.markdown is not None:
        write_text(arguments.markdown, text)
    console.print(text, markup=False)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--protocol", choices=["reference"])
    what.add_argument("--preset", nargs="+", choices=presets(), help="run these recipes")
    what.add_argument("--experiments", action="store_true", help="run the recipes of docs/experiments.md (hours)")
    what.add_argument("--parts", action="store_true", help="run the parts of the presets, alone and together (hours)")
    what.add_argument("--grid", action="store_true", help="run everything (hours)")
    parser.add_argument("--remove", nargs="+", type=float, default=[0.2, 0.4], help="of presets and grid")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds 0, 1, ... of presets and grid")
    parser.add_argument("--clip", type=float, default=0.0, help="Calibration.clip of presets and grid; 0 is off")
    parser.add_argument("--shrink", type=float, default=0.0, help="Calibration.shrink of presets and grid; 0 is off")
    parser.add_argument("--form", choices=FORMS, help="of presets and grid; default: a preset's own, and factors")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of presets and grid")
    parser.add_argument("--limit", type=int, default=8, help="evaluation windows of presets and grid")
    parser.add_argument("--work", type=Path, help="keep the analyses of presets and grid here")
    parser.add_argument("--markdown", type=Path, help="write the table of presets and grid to this file")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with wiki.valid.txt and wiki.test.raw")
    parser.add_argument("--store", type=Path, help="keep the analysis here, or reuse it")
    parser.add_argument("--json", type=Path, help="write rows and meta to this file")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if arguments.protocol is None:
        return grid(arguments, console)
    with tempfile.TemporaryDirectory() as scratch:
        rows, store = reference(arguments.data, arguments.store or Path(scratch) / "store", console)
        good = show(rows, store, console)
        hashes = {
            name: sha256_text((arguments.data / name).read_text("utf-8"))
            for name in ("wiki.valid.txt", "wiki.test.raw")
        }
        write_result(arguments.json, rows, seed=0, text_sha256=hashes, analysis=store.digest)
    console.print("all within tolerance" if good else "a figure is off by more than the tolerance")
    return 0 if good else 1


if __name__ == "__main__":
    # The repository's root holds both `bench` and, in a source tree, `unirank`.
    raise SystemExit(main())
