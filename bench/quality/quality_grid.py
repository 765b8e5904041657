"""The quality grid: schemes, allocators and presets at equal budgets, each cell in a process of its own.

Cells that are in the JSON file already are not run again, so an interrupted grid resumes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import unirank
from bench.quality.recipes import RECIPES
from bench.support.record import write_result
from unirank.models.embedded import NAME
from unirank.text.windows import BUILTIN_HELD_OUT
from unirank.types import Form


def moments_of(job: dict[str, Any]) -> str:
    """What was done to the moments of a cell or a row, behind a comma; empty for nothing."""
    said = ((name, job.get(name)) for name in ("clip", "shrink"))
    return "".join(f", {name} {value:g}" for name, value in said if value)


def cell_of(job: dict[str, Any]) -> str:
    """The name of a cell, by which an interrupted grid knows what it has."""
    recipe = job["preset"] or f"{job['scheme']} + {job['allocator']}"
    form = ", pivoted" if job["form"] == "pivoted" else ""
    return f"{recipe}, {job['remove']:.0%}, seed {job['seed']}{moments_of(job)}{form}"


def cells(
    presets: Sequence[str],
    schemes: Sequence[str],
    allocators: Sequence[str],
    removes: Sequence[float],
    seeds: range,
    clip: float = 0.0,
    form: Form | None = None,
    shrink: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Dense; every scheme with `uniform` and `unirank`; every allocator with `whiten`; every preset.

    All with `clip` and `shrink`.

    In `form`; None is a preset's own, and "factors" where there is no preset.
    """
    common = {"clip": clip, "shrink": shrink, "form": form or "factors"}
    yield common | {"preset": "", "scheme": "whiten", "allocator": "dense", "remove": 0.0, "seed": seeds[0]}
    pairs = [(scheme, allocator) for scheme in schemes for allocator in ("uniform", "unirank")]
    pairs += [("whiten", allocator) for allocator in allocators if ("whiten", allocator) not in pairs]
    for seed in seeds:
        for remove in removes:
            for scheme, allocator in pairs:
                pair = {"preset": "", "scheme": scheme, "allocator": allocator}
                yield common | pair | {"remove": remove, "seed": seed}
            for name in presets:
                own = RECIPES[name].form if name in RECIPES else unirank.recipe(name).form
                named = {"preset": name, "scheme": "", "allocator": "", "form": form or own}
                yield common | named | {"remove": remove, "seed": seed}


def run(
    data: Path, work: Path, out: Path, jobs: Sequence[dict[str, Any]], console: Console, *, windows: int, limit: int
) -> list[dict[str, Any]]:
    """Rows of all jobs, one a text; `out` is written after every job."""
    common = {
        "model": NAME,
        "calibration": str(data / "wiki.valid.txt"),
        "texts": [str(data / "wiki.test.raw"), BUILTIN_HELD_OUT],
        "windows": windows,
        "window": 512,
        "limit": limit,
        "stores": str(work),
    }
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else []
    done = {row["cell"] for row in rows}
    work.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(jobs, start=1):
        cell = cell_of(job)
        if cell in done:
            continue
        console.print(f"{number} of {len(jobs)}: {cell}")
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch) / "result.json"
            program = [sys.executable, "-m", "bench.quality.quality_job"]
            subprocess.run([*program, json.dumps(common | job), result], check=True)
            record = json.loads(result.read_text())
        texts = record.pop("texts")
        seconds = record.pop("seconds")
        rows += [
            {"model": NAME, **job, **record, **text, "cell": cell, "seconds": sum(seconds.values())}
            | {f"{stage}_seconds": value for stage, value in seconds.items()}
            for text in texts
        ]
        write_result(out, rows, seed=0, calibration_windows=windows, evaluation_windows=limit)
        console.print("   " + ", ".join(f"{text['text']}: {text['perplexity']:.2f}" for text in texts))
    return rows


def markdown(rows: Sequence[dict[str, Any]], meta: dict[str, Any]) -> str:
    """The grid as a table, best first at each removed fraction; perplexities are means over seeds, with the range."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    lines = [
        "# Results",
        "",
        "Made by `python -m bench.quality.bench_quality`, cell by cell (`--grid`, `--parts`, `--preset NAMES`, with "
        "`--remove`, `--seeds`, `--clip`, `--shrink` and `--form`, into one `--json` file), do not edit. "
        f"{NAME}, float32, {meta['calibration_windows']} calibration windows of 512 tokens of WikiText-2's validation "
        f"text, perplexity on the first {meta['evaluation_windows']} windows of 1024 tokens; tokens are not clipped "
        "and moments not shrunk (`--clip 0 --shrink 0`) unless the scheme says so. `wiki.test.raw` is WikiText-2's "
        "test text, `builtin-held-out` the held-out part of Python's documentation; several seeds of the calibration "
        "are a mean, with the range. Ranks of any size; gradients from all windows. "
        f"Python {meta['versions']['python']}, torch {meta['versions']['torch']}, {meta['device']}.",
        "",
    ]
    for remove in sorted({row["remove"] for row in rows}):
        lines += [f"## {remove:.0%} removed" if remove else "## Dense", ""]
        columns = ["preset", "scheme", "allocator", "form", *texts, "used / budget"]
        columns += ["gradients s", "analysis s", "plan s", "apply s", "heal s", "distil s", "threads", "peak MiB"]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["remove"] == remove:
                scheme = row["scheme"] + moments_of(row)
                form = "" if row["allocator"] == "dense" else row.get("form", "factors")
                groups.setdefault((row["preset"], scheme, row["allocator"], form), []).append(row)

        def figure(group: list[dict[str, Any]], text: str) -> tuple[float, str]:
            values = [row["perplexity"] for row in group if row["text"] == text]
            mean = sum(values) / len(values)
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            return mean, f"{mean:.2f}{spread}"

        for key, group in sorted(groups.items(), key=lambda item: figure(item[1], texts[0])[0]):
            shown = " | ".join(figure(group, text)[1] for text in texts)
            used = max(row["used"] / row["budget"] for row in group)
            peak = max(row["peak_mib"] for row in group)
            seconds = [f"{max(parts):.0f}" for parts in zip(*(_seconds(row, rows) for row in group), strict=True)]
            threads = max(row.get("threads", meta["threads"]) for row in group)
            cells = [*key, shown, f"{used:.4%}", *seconds, str(threads), f"{peak:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        "Seconds: the backward pass and the analysis, each where it was made (one serves every cell of its scheme and "
        "seed); the plan (what `lems` measured is kept for the next budget: 0 where another row of the same scheme and "
        "seed paid); truncation or the second pass; healing; distillation. Rows of one thread ran beside others, so "
        "their seconds only compare stages. Form: a rank costs R (M + N) parameters as factors, and R (M + N - R) "
        "pivoted; ranks are any whole numbers (`--multiple-of 1`). Perplexity: mean over seeds, with the range; "
        "else the largest."
    )
    return "\n".join(lines) + "\n"


def _seconds(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """Seconds of the backward pass, analysis, plan, application, healing and distillation that a row stands on."""
    if row["allocator"] == "dense":
        return (0.0,) * 6
    backward = [other.get("gradients_seconds", 0.0) for other in rows if row["gradients"] == other["gradients"]]
    analysis = [other["analyze_seconds"] for other in rows if row["store"] == other["store"]]
    after = (row.get(f"{stage}_seconds", 0.0) for stage in ("heal", "distill"))
    return max(backward), max(analysis), row["plan_seconds"], row["apply_seconds"], *after


def everything() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """All presets, schemes and allocators."""
    return unirank.presets(), unirank.schemes(), unirank.allocators()
