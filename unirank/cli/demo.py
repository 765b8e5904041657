"""`unirank demo`: the main job on the embedded default model, and whether it was worth it."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unirank import costs
from unirank.analysis.calibration import Calibration
from unirank.compression.checkpoint import CompressedModel
from unirank.compression.evaluations import evaluation_of
from unirank.disk.files import check_output, make_directory, write_json
from unirank.display import shows_progress, told
from unirank.evaluation.measured_curve import DENSE_PRESET, Curve, CurvePoint
from unirank.evaluation.perplexity import evaluate, generate
from unirank.inputs import loaded_from
from unirank.job import Job
from unirank.models.embedded import NAME
from unirank.progress import OnProgress, Progress, Stage, Stopwatch, expect
from unirank.provenance import default_device, meta
from unirank.rank_plan import budget_of
from unirank.recipes import Preset, preset
from unirank.report.write import usual_page, write_report
from unirank.stages import analysis_stages, stages_behind
from unirank.text.mixture import sources_of
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT, read_text
from unirank.tradeoff.kept import CURVE_FILE
from unirank.tradeoff.picture import write_curve
from unirank.tradeoff.sizes import Sizes
from unirank.tradeoff.stores import Stores
from unirank.tradeoff.swapping import added_biases
from unirank.types import DENSE, LoadedModel, Rank

RESULTS = "demo.json"
PROMPT = "The for statement in Python is used to"
WINDOWS = 32  # of calibration: half of the default, so that all of it takes minutes (**choice**)
BEST = "fast"  # the best preset whose time fits


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table, with the keys of every quality row."""

    model: str
    preset: str
    scheme: str
    allocator: str
    form: str
    remove: float
    text: str
    perplexity: float
    used: int
    budget: int
    seconds: float
    parameters: int
    bytes: int
    flops: int
    removed_of_model: float
    sample: str


@dataclass(frozen=True)
class DemoResult:
    """What came out.

    Attributes:
        rows: dense, then each recipe at each fraction.
        seconds: of every stage, summed.
        checkpoints: of the best preset.
        pages: files to look at: the curve, and a report for each checkpoint.
        int8_bytes: of the dense model's weights with 8 bits, for comparison.
    """

    rows: tuple[DemoRow, ...]
    seconds: dict[str, float]
    checkpoints: tuple[Path, ...]
    pages: tuple[Path, ...]
    int8_bytes: int
    meta: dict[str, Any]


def recipes() -> dict[str, Preset]:
    """What is put side by side: ranks without any thought, the paper, and the best preset whose time fits."""
    return {"uniform": Preset("whiten", "uniform"), "unirank": preset("unirank"), BEST: preset(BEST)}


@shows_progress
def demo(
    out: str | Path,
    *,
    remove: Sequence[float] = (0.1, 0.3),
    model: str = NAME,
    calibration: Calibration | None = None,
    limit: int = 8,
    device: str | None = None,
    progress: Progress = None,
) -> DemoResult:
    """Compress `model` by uniform ranks, by UniRank (the paper) and by the preset `fast`, at each removed fraction.

    Calibrates on the first part of Python's documentation and evaluates on its held-out last part (`limit` windows of
    1024 tokens). Writes the analyses, the curve, the checkpoints and reports of `fast`, and `demo.json` into `out`;
    running it again resumes and replaces. Raises like the stages that it runs.
    """
    out, report = Path(out), told(progress)
    for fraction in remove:
        budget_of(fraction, 0)
    check_output(out, marker=RESULTS, overwrite=True)
    clock = Stopwatch()
    device = device or default_device()
    calibration = calibration or Calibration(text=BUILTIN, windows=WINDOWS)
    loaded = loaded_from(model, None, device=device, progress=report)
    clock.lap("load")
    make_directory(out)
    if not (out / RESULTS).is_file():
        write_json(out / RESULTS, {"rows": [], "meta": {}})  # marks the directory as ours
    run = _Run(out, loaded, calibration, tuple(remove), limit, clock, report)
    run.announce()
    rows, points, checkpoints = run.all()
    texts = {source: read_text(source).sha256 for source in (*sources_of(calibration.text), BUILTIN_HELD_OUT)}
    made_by = meta(device, seed=calibration.seed, text_sha256=texts)
    write_curve(Curve(loaded.source, points[0], tuple(points[1:]), made_by), out)
    pages = [out / "curve.svg"]
    for checkpoint, store in checkpoints.items():
        pages.append(usual_page(checkpoint))
        write_report(checkpoint, pages[-1], store=store, curve=out / CURVE_FILE, overwrite=True)
    record = {"rows": [asdict(row) for row in rows], "seconds": clock.seconds, "meta": made_by}
    write_json(out / RESULTS, record)
    return DemoResult(tuple(rows), clock.seconds, tuple(checkpoints), tuple(pages), points[0].bytes["int8"], made_by)


class _Under:
    """Tells `progress` of stages under a name of their own, so that the same stage can run several times."""

    def __init__(self, progress: OnProgress, name: str) -> None:
        self._progress, self._name = progress, name

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._progress(f"{self._name}: {stage}", done, total)

    def expect(self, stages: Sequence[Stage]) -> None:
        expect(self._progress, [dataclasses.replace(stage, name=f"{self._name}: {stage.name}") for stage in stages])


class _Run:
    """One model after the other: made, measured, and where it is the best preset's, saved."""

    def __init__(
        self,
        out: Path,
        loaded: LoadedModel,
        calibration: Calibration,
        remove: tuple[float, ...],
        limit: int,
        clock: Stopwatch,
        progress: OnProgress,
    ) -> None:
        self._out, self._loaded, self._calibration, self._remove = out, loaded, calibration, remove
        self._limit, self._clock, self._progress = limit, clock, progress
        self._sizes, self._name = Sizes.of(loaded), Path(loaded.source).name
        self._recipes = recipes()

    def announce(self) -> None:
        """All stages, with what they cost."""
        sizes, asked = costs.Sizes.of(self._loaded), self._calibration
        numbers = {"windows": asked.windows, "window": asked.window}
        tokens = self._limit * 1024
        stages, known = [costs.load(sizes), costs.evaluation(sizes, "dense: perplexity", tokens)], set()
        for name, recipe in self._recipes.items():
            for fraction in self._remove:
                label = f"{name} {fraction:.0%}"
                if recipe.scheme not in known:
                    under = analysis_stages(sizes, recipe.scheme, **numbers, backward=0)
                    stages += [dataclasses.replace(one, name=f"{recipe.scheme}: {one.name}") for one in under]
                measured = fraction != self._remove[0]  # the store keeps what was measured for the first one
                under = stages_behind(sizes, recipe, **numbers, ranks_are_given=measured)
                stages += [dataclasses.replace(one, name=f"{label}: {one.name}") for one in under]
                stages.append(costs.evaluation(sizes, f"{label}: perplexity", tokens))
                known.add(recipe.scheme)
        expect(self._progress, stages)

    def all(self) -> tuple[list[DemoRow], list[CurvePoint], dict[Path, Any]]:
        """Rows and points, dense first; and the checkpoints with their stores."""
        dense = self._dense()
        rows, points, checkpoints = [dense[0]], [dense[1]], {}
        for name, recipe in self._recipes.items():
            under = _Under(self._progress, recipe.scheme)
            stores = Stores(self._out, self._loaded, [recipe], self._calibration, overwrite=True, progress=under)
            store = stores.of(recipe)
            self._clock.lap("analyze")
            for fraction in self._remove:
                label, start = f"{name} {fraction:.0%}", time.perf_counter()
                under, work = _Under(self._progress, label), self._out / "work"
                job = Job(
                    remove=fraction,
                    ranks=None,
                    recipe=recipe,
                    min_rank=1,
                    multiple_of=None,
                    calibration=self._calibration,
                    progress=under,
                )
                compressed = job.finish(self._loaded, store, copy=True, work=work)
                shutil.rmtree(work, ignore_errors=True)
                self._clock.lap(f"compress, {name}")
                row, point, compressed = self._measure(name, compressed, dense[1], time.perf_counter() - start, under)
                rows.append(row)
                points.append(point)
                if name == BEST:
                    target = self._out / f"{self._name}-{name}-{round(fraction * 100):02d}"
                    compressed.save(target, overwrite=True)
                    checkpoints[target] = store
                    self._clock.lap("save")
        return rows, points, checkpoints

    def _dense(self) -> tuple[DemoRow, CurvePoint]:
        sizes, total = self._sizes, self._sizes.targets
        ranks: dict[str, Rank] = {spec.name: DENSE for spec in self._loaded.linears}
        facts = {"removed_of_targets": 0.0, "used": total, "budget": total, "parameters": sizes.parameters}
        facts |= {"remove": 0.0, "removed_of_model": 0.0, "bytes": sizes.table(ranks, "factors")}
        under = _Under(self._progress, "dense")
        return self._row(self._loaded.model, DENSE_PRESET, facts, ("-", "dense", "-"), 0.0, under)

    def _measure(
        self, name: str, made: CompressedModel, dense: CurvePoint, seconds: float, progress: OnProgress
    ) -> tuple[DemoRow, CurvePoint, CompressedModel]:
        """Row and point, and the model with its perplexity in its record."""
        plan, report, sizes = made.plan, made.report, self._sizes
        biased = added_biases(made.model, plan.ranks)
        facts: dict[str, Any] = {"remove": plan.remove, "removed_of_targets": report.removed_of_targets}
        facts |= {"removed_of_model": report.removed_of_model, "used": plan.used, "budget": plan.budget}
        facts |= {"parameters": report.model_after, "bytes": sizes.table(plan.ranks, plan.form, adds_bias=biased)}
        row, point = self._row(made.model, name, facts, (plan.scheme, plan.allocator, plan.form), seconds, progress)
        added = evaluation_of(point.evaluations[0], dense=dense.evaluations[0])
        return row, point, dataclasses.replace(made, evaluations=(added,))

    def _row(
        self,
        model: Any,
        name: str,
        facts: Mapping[str, Any],
        recipe: tuple[str, str, str],
        seconds: float,
        progress: OnProgress,
    ) -> tuple[DemoRow, CurvePoint]:
        report = evaluate(model, self._loaded.tokenizer, limit=self._limit, stage="perplexity", progress=progress)
        self._clock.lap("evaluate")
        sample = generate(model, self._loaded.tokenizer, PROMPT)
        self._clock.lap("generate")
        point = CurvePoint(
            preset=name,
            flops=self._sizes.flops(facts["used"]),
            evaluations=(report,),
            tokens_per_second=None,
            seconds=seconds,
            **facts,
        )
        row = DemoRow(
            model=self._name,
            preset="" if name in (DENSE_PRESET, "uniform") else name,
            scheme=recipe[0],
            allocator=recipe[1],
            form=recipe[2],
            remove=point.remove,
            text=report.text,
            perplexity=report.perplexity,
            used=point.used,
            budget=point.budget,
            seconds=seconds,
            parameters=report.parameters,
            bytes=point.bytes[report.dtype],
            flops=point.flops,
            removed_of_model=point.removed_of_model,
            sample=sample,
        )
        return row, point
