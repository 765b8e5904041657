"""The commands that make something of a dense model: `unirank demo`, `analyze`, `plan` and `compress`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unirank.cli import endings, options, views
from unirank.cli.arguments import (
    PLANNING,
    check_preset,
    check_source,
    read_calibration,
    read_form,
    read_options,
    read_refine,
    read_settings,
    read_target,
)
from unirank.cli.reaching import reached_line
from unirank.cli.terminal import Session, in_flags, run_session

if TYPE_CHECKING:
    from unirank.analysis.needs import Needs
    from unirank.recipes import Preset


def demo_command(
    out: Annotated[Path, options.out("Directory for analyses, checkpoints, reports, the curve and demo.json.")] = Path(
        "unirank-demo"
    ),
    remove: Annotated[
        list[float] | None, options.fraction(options.REMOVE_HELP + " Repeatable.", "--remove", "-r")
    ] = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """The main job on the embedded default, SmolLM2-135M: uniform ranks, the paper's, the preset fast, and dense."""
    from unirank.cli.demo import demo
    from unirank.cli.demo_view import demo_record, demo_view

    with run_session(as_json) as session:
        result = demo(out, remove=remove or (0.1, 0.3), device=device, progress=session.progress)
        following = endings.after_compress(result.checkpoints[0], options.EMBEDDED)
        session.show(demo_record(result), *demo_view(result), following)


def analyze_command(
    model: options.Model,
    out: Annotated[Path, options.out("Directory of the analysis store.")],
    preset: options.Preset = None,
    calib: options.Calib = None,
    calib_shares: options.CalibShares = None,
    windows: options.Windows = None,
    window: options.Window = None,
    seed: options.Seed = None,
    batch: options.Batch = None,
    gradients: options.Gradients = None,
    gradients_from: Annotated[
        Path | None,
        options.option(
            "Take the gradients of this store (same model, same calibration, any scheme).", group="Calibration"
        ),
    ] = None,
    clip: options.Clip = None,
    shrink: options.Shrink = None,
    precision: options.Precision = None,
    split: options.Split = None,
    text_revision: options.TextRevision = None,
    scheme: options.Scheme = None,
    stream: options.Stream = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    model_revision: options.ModelRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    keep_hidden: Annotated[
        bool | None,
        options.option(
            "Write what enters the next layer to the disk too, so that an interrupted run does not run finished layers "
            "again. Default: on a CPU, not on a GPU.",
            "--keep-hidden/--no-keep-hidden",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Calibrate and decompose every layer, once for all ratios. Expensive; an interrupted run resumes."""
    import unirank
    from unirank.analysis.deficient import as_record, deficient, told

    with run_session(as_json, parallel=True) as session:
        calibration = read_calibration(
            calib, calib_shares, windows, window, seed, batch, gradients, clip, shrink, precision, split, text_revision
        )
        asked: dict[str, Any] = {"preset": preset, "scheme": scheme, "calibration": calibration, "stream": stream}
        asked |= {"dtype": dtype, "device": device, "revision": model_revision, "trust_remote_code": trust_remote_code}
        asked |= {"keep_hidden": keep_hidden, "progress": session.progress}
        if dry_run:
            _show_needs(session, unirank.dry_run(model, out, **asked))
            return
        store = unirank.analyze(model, out, gradients_from=gradients_from, overwrite=overwrite, **asked)
        record = {
            "store": str(out),
            "layers": store.layer_count,
            "identity": store.identity.as_dict(),
            "sha256": store.digest,
            "damping": views.damping_record(store),
            "deficient": as_record(short := deficient(store)),
        }
        session.show(
            record,
            views.cosine_table(store),
            *views.damping_summary(store),
            *([in_flags(told(short, len(store.linears)))] if short else []),
            f"Store: {out}.",
            endings.after_analyze(out, model, preset, calib),
        )


def plan_command(
    ctx: typer.Context,
    store: options.Store,
    remove: options.Remove = None,
    ranks: options.RanksFile = None,
    preset: options.Preset = None,
    against: Annotated[
        str | None, options.option("The dense model, for allocators that measure it (others do not load it).")
    ] = None,
    calib: Annotated[
        str | None, options.option("The store's calibration text, for the same; needed where it was a file.")
    ] = None,
    allocator: options.Allocator = None,
    set_: options.Set = None,
    min_rank: options.MinRank = 1,
    multiple_of: options.MultipleOf = None,
    form: options.Form = None,
    importance: options.Importance = None,
    distance: options.Distance = None,
    gamma: options.Gamma = None,
    local: options.Local = None,
    per_parameter: options.PerParameter = False,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path | None, options.out("Also write the plan to this JSON file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Ranks for an exact budget from a finished store. Any ratio, any allocator; most load no model."""
    import unirank
    from unirank.disk.files import write_text

    with run_session(as_json, models=against is not None) as session:
        check_source(ctx, remove, ranks)
        check_preset(ctx, preset, PLANNING)
        chosen = unirank.plan(
            store,
            remove,
            ranks=ranks,
            preset=preset,
            allocator=allocator,
            settings=read_settings(importance, distance, gamma, local, per_parameter),
            options=read_options(set_),
            min_rank=min_rank,
            multiple_of=multiple_of,
            form=read_form(form),
            against=against,
            calibration=calib,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=session.progress,
        )
        written: list[Any] = []
        if out is not None:
            write_text(out, chosen.to_json())
            written.append(f"Written to {out}.")
        if preset is not None:
            written += views.afterwards_hint(unirank.recipe(preset))
        written.append(endings.after_plan(ctx, store, out))
        session.show(json.loads(chosen.to_json()), views.plan_table(chosen), views.plan_summary(chosen), *written)


def compress_command(
    ctx: typer.Context,
    model: options.Model,
    out: Annotated[Path, options.out("Directory of the compressed checkpoint.")],
    remove: options.Remove = None,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    params: options.Params = None,
    size: options.Size = None,
    bits: options.Bits = None,
    text: options.TargetText = None,
    text_window: options.TextWindow = None,
    text_limit: options.TextLimit = None,
    evaluations: options.Evaluations = None,
    ranks: options.RanksFile = None,
    preset: options.Preset = None,
    calib: options.Calib = None,
    store: Annotated[
        Path | None,
        options.option(
            "Analysis store to make, resume or reuse. Default: OUT with -analysis appended. "
            "A finished one is taken as it is where nothing is said about calibration; --calib alone says where "
            "its text is."
        ),
    ] = None,
    calib_shares: options.CalibShares = None,
    windows: options.Windows = None,
    window: options.Window = None,
    seed: options.Seed = None,
    batch: options.Batch = None,
    gradients: options.Gradients = None,
    clip: options.Clip = None,
    shrink: options.Shrink = None,
    precision: options.Precision = None,
    split: options.Split = None,
    text_revision: options.TextRevision = None,
    scheme: options.Scheme = None,
    refine: options.Refine = None,
    refine_damping: options.RefineDamping = None,
    refine_shrink: options.RefineShrink = None,
    refine_metric: options.RefineMetric = False,
    refine_metric_damping: options.RefineMetricDamping = None,
    refine_centred: options.RefineCentred = False,
    refine_dense: options.RefineDense = False,
    heal: options.Heal = False,
    allocator: options.Allocator = None,
    set_: options.Set = None,
    min_rank: options.MinRank = 1,
    multiple_of: options.MultipleOf = None,
    form: options.Form = None,
    importance: options.Importance = None,
    distance: options.Distance = None,
    gamma: options.Gamma = None,
    local: options.Local = None,
    per_parameter: options.PerParameter = False,
    stream: options.Stream = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    model_revision: options.ModelRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    report: Annotated[
        bool,
        options.option(
            "Write the page of `unirank report` too, OUT with .html appended.", "--report/--no-report", group="Output"
        ),
    ] = True,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Analyze, plan, truncate and save a checkpoint that transformers loads after `import unirank`."""
    import unirank
    from unirank.analysis.deficient import deficient, told
    from unirank.analysis.store import open_store
    from unirank.compression.card import PLAN_FILE
    from unirank.disk.files import beside, check_output
    from unirank.finetuning.settings import Heal
    from unirank.job import Job
    from unirank.recipes import recipe as recipe_of
    from unirank.report.cautions import built_in
    from unirank.report.keeping import write_usual_page
    from unirank.report.write import check_page, usual_page
    from unirank.tradeoff.choosing import TargetChooser
    from unirank.tradeoff.picture import write_curve

    with run_session(as_json, parallel=True) as session:
        check_source(ctx, remove, ranks, max_perplexity_increase, params, size)
        measured = (text, text_window, text_limit, evaluations)
        target = read_target(max_perplexity_increase, params, size, bits, *measured)
        numbers = refine_damping, refine_shrink, refine_metric_damping
        second = read_refine(refine, *numbers, refine_metric, refine_centred, refine_dense)
        check_preset(ctx, preset, PLANNING)
        recipe: Preset = recipe_of(
            preset,
            scheme=scheme,
            allocator=allocator,
            settings=read_settings(importance, distance, gamma, local, per_parameter),
            options=read_options(set_),
            refine=second,
            heal=Heal() if heal else None,
        )
        chooser = None if target is None else TargetChooser(target, beside(out, "-curve"))
        job = Job(
            remove=remove,
            ranks=ranks,
            recipe=recipe,
            min_rank=min_rank,
            multiple_of=multiple_of,
            calibration=read_calibration(
                *(calib, calib_shares, windows, window, seed, batch, gradients),
                *(clip, shrink, precision, split, text_revision),
            ),
            scheme_is_free=preset is None and scheme is None,
            form=read_form(form),
            choose=chooser,
            then=("save",),
            progress=session.progress,
        )
        loading = {"dtype": dtype, "device": device, "revision": model_revision}
        loading |= {"trust_remote_code": trust_remote_code, "stream": stream}
        place = store or beside(out, "-analysis")
        job.check(stream=stream, dry_run=dry_run)
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        if report:
            check_page(usual_page(out), overwrite=overwrite, ours=True)
        if dry_run:
            loaded = unirank.load(model, **{**loading, "stream": True})
            _show_needs(session, job.needs(loaded, place, stream=stream))
            return
        # A store that the user named is never replaced in passing.
        replace = overwrite and store is None
        work = beside(out, "-healing")
        compressed = job.run(model, place, overwrite=replace, first_alone=True, work=work, **loading)
        if compressed is None:
            return
        reached = None if chooser is None else chooser.reached
        if reached is not None:
            compressed = reached.told(compressed)
            if reached.curve is not None:
                write_curve(reached.curve, beside(out, "-curve"))
        with session.stage("save"):
            compressed.save(out, overwrite=overwrite)
        if recipe.heal is not None:
            shutil.rmtree(work)
        record: dict[str, Any] = {"out": str(out), "store": str(place), "report": compressed.report.as_dict()}
        record |= {"budget": compressed.plan.budget, "used": compressed.plan.used}
        record |= endings.saved_sizes(compressed, out)
        lines = views.compress_view(compressed, out, place)
        if short := deficient(made_from := open_store(place)):
            lines.append(in_flags(told(short, len(made_from.linears))))
        lines += built_in(compressed.identity)
        lines.append(endings.sizes_line(record, compressed.report.removed_of_targets))
        if reached is not None:
            record["target"] = reached.as_dict()
            lines = [reached_line(reached), *lines]
        if report:
            written = write_usual_page(out, place)
            record |= {"page": written.as_dict()["page"], "notes": list(written.notes)}
            lines += written.lines(str(out))
        following = endings.after_compress(out, model, text, text_limit)
        session.show(record, *lines, following)


def _show_needs(session: Session, found: Needs) -> None:
    """Print it; raises InputError, after that, where the run cannot fit."""
    session.show(found.as_dict(), *views.needs_view(found))
    found.require_fit()
