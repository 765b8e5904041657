"""`unirank demo`: the main job on the embedded default model, and whether it was worth it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unirank.analysis.calibration import Calibration
from unirank.api import analyze, plan
from unirank.compression.truncation import TruncateReport
from unirank.disk.files import bytes_on_disk, check_output, make_directory, write_json
from unirank.evaluation.perplexity import EvalReport, evaluate, generate
from unirank.job import apply
from unirank.models.embedded import NAME
from unirank.models.loading import load
from unirank.progress import OnProgress, Stopwatch, silent
from unirank.provenance import default_device, meta
from unirank.rank_plan import RankPlan, budget_of
from unirank.text.mixture import sources_of
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT, read_text
from unirank.types import LoadedModel

RESULTS = "demo.json"
PROMPT = "The for statement in Python is used to"


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table, with the keys of every quality row."""

    model: str
    scheme: str
    allocator: str
    remove: float
    text: str
    perplexity: float
    used: int
    budget: int
    seconds: float
    parameters: int
    bytes: int
    removed_of_model: float
    sample: str


@dataclass(frozen=True)
class DemoResult:
    """All rows, the seconds of every stage, and where the UniRank checkpoints are."""

    rows: tuple[DemoRow, ...]
    seconds: dict[str, float]
    checkpoints: tuple[Path, ...]
    meta: dict[str, Any]


def demo(
    out: str | Path,
    *,
    remove: Sequence[float] = (0.2, 0.4),
    model: str = NAME,
    calibration: Calibration | None = None,
    limit: int = 8,
    device: str | None = None,
    progress: OnProgress = silent,
) -> DemoResult:
    """Compress `model` by uniform ranks and by UniRank at each removed fraction, and compare perplexities.

    Calibrates on the first part of Python's documentation and evaluates on its held-out last part (`limit` windows of
    1024 tokens). Writes the analysis store, the checkpoints and `demo.json` into `out`; running it again resumes and
    replaces. Raises like the stages that it runs.
    """
    out = Path(out)
    for fraction in remove:
        budget_of(fraction, 0)
    check_output(out, marker=RESULTS, overwrite=True)
    clock = Stopwatch()
    device = device or default_device()
    calibration = calibration or Calibration(text=BUILTIN)
    progress("load", 0, 1)
    loaded = load(model, device=device)
    clock.lap("load")
    progress("load", 1, 1)
    make_directory(out)
    if not (out / RESULTS).is_file():
        write_json(out / RESULTS, {"rows": [], "meta": {}})  # marks the directory as ours
    name = Path(model).name
    store = analyze(loaded, out / "analysis", calibration=calibration, overwrite=True, progress=progress)
    clock.lap("analyze")

    dense_bytes = _dense_bytes(loaded)
    total = budget_of(0, sum(spec.params for spec in loaded.linears))
    rows, checkpoints = [], []
    report = _evaluate(loaded.model, loaded.tokenizer, "dense", limit, progress)
    clock.lap("evaluate")
    sample = generate(loaded.model, loaded.tokenizer, PROMPT)
    clock.lap("generate")
    rows.append(
        DemoRow(
            model=name,
            scheme="-",
            allocator="dense",
            remove=0.0,
            text=report.text,
            perplexity=report.perplexity,
            used=total,
            budget=total,
            seconds=0.0,
            parameters=report.parameters,
            bytes=dense_bytes,
            removed_of_model=0.0,
            sample=sample,
        )
    )
    for fraction in remove:
        for allocator in ("uniform", "unirank"):
            label = f"{allocator} {fraction:.0%}"
            start = time.perf_counter()
            ranks = plan(store, fraction, allocator=allocator)
            clock.lap("plan")
            compressed = apply(loaded, store, ranks, copy=True)
            clock.lap("truncate")
            target = out / f"{name}-{allocator}-{round(fraction * 100):02d}"
            compressed.save(target, overwrite=True)
            clock.lap("save")
            seconds = time.perf_counter() - start
            report = _evaluate(compressed.model, loaded.tokenizer, label, limit, progress)
            clock.lap("evaluate")
            sample = generate(compressed.model, loaded.tokenizer, PROMPT)
            clock.lap("generate")
            rows.append(_row(name, ranks, report, compressed.report, bytes_on_disk(target), seconds, sample))
            if allocator == "unirank":
                checkpoints.append(target)
    texts = {source: read_text(source).sha256 for source in (*sources_of(calibration.text), BUILTIN_HELD_OUT)}
    result = DemoResult(
        tuple(rows), clock.seconds, tuple(checkpoints), meta(device, seed=calibration.seed, text_sha256=texts)
    )
    record = {"rows": [asdict(row) for row in rows], "seconds": clock.seconds, "meta": result.meta}
    write_json(out / RESULTS, record)
    return result


def _evaluate(model: Any, tokenizer: Any, label: str, limit: int, progress: OnProgress) -> EvalReport:
    return evaluate(model, tokenizer, limit=limit, stage=f"perplexity, {label}", progress=progress)


def _row(
    name: str,
    ranks: RankPlan,
    report: EvalReport,
    truncated: TruncateReport,
    size: int,
    seconds: float,
    sample: str,
) -> DemoRow:
    return DemoRow(
        model=name,
        scheme=ranks.scheme,
        allocator=ranks.allocator,
        remove=ranks.remove,
        text=report.text,
        perplexity=report.perplexity,
        used=ranks.used,
        budget=ranks.budget,
        seconds=seconds,
        parameters=report.parameters,
        bytes=size,
        removed_of_model=truncated.removed_of_model,
        sample=sample,
    )


def _dense_bytes(loaded: LoadedModel) -> int:
    """Bytes of the dense weights as safetensors keeps them, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
