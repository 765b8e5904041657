"""The command line: thin, typed functions over the library. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from unirank.analysis.calibration import Calibration
from unirank.analysis.dry_run import Estimate, estimate
from unirank.analysis.fill_store import analyze as run_analyze
from unirank.analysis.scheme import scheme as scheme_of
from unirank.analysis.store import open_store
from unirank.api import analysis_for, apply
from unirank.cli import options as flags
from unirank.cli import views as tables
from unirank.cli.compressed import densify_command, finetune_command, report_command
from unirank.cli.demo import demo as run_demo
from unirank.cli.looking import diagnose_command, evaluate_command, info_command
from unirank.cli.terminal import Session, exit_codes, run_session
from unirank.compression.checkpoint import PLAN_FILE
from unirank.compression.refine import Refine
from unirank.disk.files import beside, check_output, write_text
from unirank.distributed import rank
from unirank.errors import InputError
from unirank.models.loading import load
from unirank.planning.allocator import allocator as allocator_of
from unirank.planning.imported_ranks import import_plan, read_rank_file, read_ranks
from unirank.planning.measuring import make_workbench
from unirank.planning.ranks import check_request
from unirank.planning.ranks import plan as make_plan
from unirank.planning.score import ScoreSettings
from unirank.provenance import versions
from unirank.recipes import Preset
from unirank.recipes import preset as preset_of
from unirank.text.windows import BUILTIN

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make Hugging Face language models smaller by low-rank decomposition. "
    "`remove` is everywhere the fraction of the decoder linears' weights that is removed.",
)

# What shapes a plan, so that it has no meaning for one that is read from a file.
_SCORING = ("allocator", "options", "importance", "distance", "gamma", "local", "per_parameter")
_PLANNING = ("min_rank", "multiple_of", *_SCORING)
# What a preset sets.
_RECIPE = ("scheme", "refine", *_SCORING)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"unirank {versions()['unirank']}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for store, checkpoints and demo.json.")] = Path(
        "unirank-demo"
    ),
    remove: Annotated[
        list[float] | None, typer.Option("--remove", "-r", help=flags.REMOVE_HELP + " Repeatable.")
    ] = None,
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    """The main job on the embedded default: SmolLM2-135M, uniform ranks against UniRank, dense in the same table."""
    with run_session(as_json) as session:
        result = run_demo(out, remove=remove or (0.2, 0.4), device=device, progress=session.progress)
        session.show(tables.demo_record(result), *tables.demo_view(result))


@app.command()
def analyze(
    model: flags.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the analysis store.")],
    scheme: flags.Scheme = "whiten",
    calib: flags.Calib = BUILTIN,
    split: flags.Split = None,
    revision: flags.Revision = None,
    windows: flags.Windows = 64,
    window: flags.Window = 512,
    seed: flags.Seed = 0,
    batch: flags.Batch = 8,
    gradients: flags.Gradients = None,
    gradients_from: Annotated[
        Path | None,
        typer.Option(help="Take the gradients of this store (same model, same calibration, any scheme)."),
    ] = None,
    stream: flags.Stream = False,
    dry_run: flags.DryRun = False,
    dtype: flags.Dtype = "auto",
    device: flags.Device = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
) -> None:
    """Calibrate and decompose every layer, once for all ratios. Expensive; an interrupted run resumes."""
    with run_session(as_json, parallel=True) as session:
        scheme_of(scheme)
        loaded = load(model, dtype=dtype, device=device, stream=stream or dry_run)
        calibration = Calibration(calib, windows, window, seed, batch, gradients, split, revision)
        if dry_run:
            found = estimate(
                loaded, out, scheme=scheme, calibration=calibration, stream=stream, progress=session.progress
            )
            _show_estimate(session, found)
            return
        store = run_analyze(
            loaded,
            out,
            scheme=scheme,
            calibration=calibration,
            gradients_from=gradients_from,
            overwrite=overwrite,
            progress=session.progress,
        )
        record = {
            "store": str(out),
            "layers": store.layer_count,
            "identity": dict(store.identity),
            "sha256": store.digest,
            "damping": tables.damping_record(store),
        }
        session.show(
            record,
            tables.cosine_table(store),
            *tables.damping_summary(store),
            f"Store: {out}. Next: unirank plan {out} --remove 0.2",
        )


@app.command()
def plan(
    ctx: typer.Context,
    store: Annotated[Path, typer.Argument(help="Directory that `unirank analyze` made.")],
    remove: flags.Remove = None,
    ranks: Annotated[Path | None, typer.Option("--ranks", help=flags.RANKS_HELP)] = None,
    allocator: flags.AllocatorName = "unirank",
    options: flags.Set = None,
    min_rank: flags.MinRank = 1,
    multiple_of: flags.MultipleOf = 1,
    importance: flags.Importance = "sublayer",
    distance: flags.Distance = "cosine",
    gamma: flags.Gamma = 1.0,
    local: flags.Local = "energy",
    per_parameter: flags.PerParameter = False,
    model: Annotated[
        str | None, typer.Option(help="The dense model, for allocators that measure it (others do not load it).")
    ] = None,
    calib: Annotated[
        str | None, typer.Option(help="The store's calibration text, for the same; needed where it was a file.")
    ] = None,
    device: flags.Device = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the plan to this JSON file.")] = None,
    as_json: flags.Json = False,
) -> None:
    """Ranks for an exact budget from a finished store. Any ratio, any allocator; most load no model."""
    with run_session(as_json) as session:
        _check_source(ctx, remove, ranks, "--ranks")
        analysis = open_store(store)
        if ranks is not None:
            chosen = import_plan(analysis, read_rank_file(ranks))
        else:
            assert remove is not None
            request: dict[str, Any] = {
                "allocator": allocator,
                "min_rank": min_rank,
                "multiple_of": multiple_of,
                "options": _options(options),
            }
            check_request(analysis.linears, remove, **request)
            workbench = None
            if model is not None and allocator_of(allocator).measures:
                analysis.require_complete()
                loaded = load(model, dtype=analysis.identity["model"]["dtype"], device=device)
                workbench = make_workbench(loaded, analysis, text=calib, progress=session.progress)
            settings = _settings(importance, distance, gamma, local, per_parameter)
            chosen = make_plan(analysis, remove, settings=settings, workbench=workbench, **request)
        written = []
        if out is not None:
            write_text(out, chosen.to_json())
            written.append(f"Written to {out}.")
        session.show(json.loads(chosen.to_json()), tables.plan_table(chosen), tables.plan_summary(chosen), *written)


@app.command()
def compress(
    ctx: typer.Context,
    model: flags.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the compressed checkpoint.")],
    remove: flags.Remove = None,
    plan: Annotated[Path | None, typer.Option("--plan", help=flags.RANKS_HELP)] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Analysis store to make, resume or reuse; default: OUT with -analysis appended. "
            "A finished one is taken as it is where no calibration option is given."
        ),
    ] = None,
    scheme: flags.Scheme = "whiten",
    allocator: flags.AllocatorName = "unirank",
    options: flags.Set = None,
    min_rank: flags.MinRank = 1,
    multiple_of: flags.MultipleOf = 1,
    importance: flags.Importance = "sublayer",
    distance: flags.Distance = "cosine",
    gamma: flags.Gamma = 1.0,
    local: flags.Local = "energy",
    per_parameter: flags.PerParameter = False,
    calib: Annotated[str | None, typer.Option(help=f"{flags.CALIB_HELP} Default: {BUILTIN}.")] = None,
    split: flags.Split = None,
    revision: flags.Revision = None,
    windows: Annotated[int | None, typer.Option(help="Calibration windows. Default: 64.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a calibration window. Default: 512.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the window positions. Default: 0.")] = None,
    batch: Annotated[int | None, typer.Option(help="Windows that run together. Default: 8.")] = None,
    gradients: flags.Gradients = None,
    preset: Annotated[str | None, typer.Option(help=flags.PRESET_HELP)] = None,
    refine: Annotated[float | None, typer.Option(metavar="MIX", help=flags.REFINE_HELP)] = None,
    stream: flags.Stream = False,
    dry_run: flags.DryRun = False,
    dtype: flags.Dtype = "auto",
    device: flags.Device = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
) -> None:
    """Analyze, plan, truncate and save a checkpoint that transformers loads after `import unirank`."""
    with run_session(as_json, parallel=True) as session:
        _check_source(ctx, remove, plan, "--plan")
        text = None if plan is None else read_rank_file(plan)
        if preset is not None:
            _check_alone(ctx, "--preset", _RECIPE)
            recipe = preset_of(preset)
        else:
            settings = _settings(importance, distance, gamma, local, per_parameter)
            second = None if refine is None else Refine(mix=refine)
            recipe = Preset(scheme, allocator, settings, _options(options), second)
        request: dict[str, Any] = {"allocator": recipe.allocator, "min_rank": min_rank, "multiple_of": multiple_of}
        request["options"] = recipe.options
        if remove is not None:
            check_request((), remove, **request)
        scheme_of(recipe.scheme)
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        if recipe.needs_tokens:
            for flag, given in (("--stream", stream), ("--dry-run", dry_run)):
                if given:
                    raise InputError(
                        f"{flag} covers analysis and truncation; {recipe.needs_tokens_for} would run the whole model."
                    )
        loaded = load(model, dtype=dtype, device=device, stream=stream or dry_run)
        if remove is not None:
            check_request(loaded.linears, remove, **request)
        if text is not None:
            read_ranks(loaded.linears, text)
        given = {"text": calib, "windows": windows, "window": window, "seed": seed, "batch": batch}
        given |= {"gradient_windows": gradients, "split": split, "revision": revision}
        given = {key: value for key, value in given.items() if value is not None}
        calibration = Calibration(**given) if given else None
        where = store or beside(out, "-analysis")
        if dry_run:
            found = estimate(
                loaded,
                where,
                scheme=recipe.scheme,
                calibration=calibration,
                stream=stream,
                remove=remove or 0.0,
                progress=session.progress,
            )
            _show_estimate(session, found)
            return
        analysis = analysis_for(
            loaded,
            where,
            recipe=recipe,
            calibration=calibration,
            overwrite=overwrite and store is None,  # a store that the user named is never replaced in passing
            progress=session.progress,
        )
        if rank() > 0:
            return  # the analysis is shared out; the rest is one process's
        workbench = None
        if recipe.needs_tokens:
            workbench = make_workbench(loaded, analysis, text=calib, progress=session.progress)
        if text is not None:
            ranks = import_plan(analysis, text)
        else:
            assert remove is not None
            ranks = make_plan(analysis, remove, settings=recipe.settings, workbench=workbench, **request)
        tokens = workbench.windows if workbench is not None else None
        compressed = apply(loaded, analysis, ranks, refine=recipe.refine, windows=tokens, progress=session.progress)
        compressed.save(out, overwrite=overwrite)
        record = {"out": str(out), "store": str(analysis.path), "report": compressed.report.as_dict()}
        record |= {"budget": ranks.budget, "used": ranks.used}
        session.show(record, *tables.compress_view(compressed, out, analysis.path))


app.command(name="diagnose")(diagnose_command)
app.command(name="eval")(evaluate_command)
app.command(name="finetune")(finetune_command)
app.command(name="densify")(densify_command)
app.command(name="report")(report_command)
app.command(name="info")(info_command)


def _show_estimate(session: Session, found: Estimate) -> None:
    """Print it; raises InputError, after that, where the run cannot fit."""
    session.show(found.as_dict(), *tables.estimate_view(found))
    found.require_fit()


def _settings(importance: Any, distance: Any, gamma: float, local: Any, per_parameter: bool) -> ScoreSettings:
    return ScoreSettings(importance, distance, gamma, local, per_parameter)


def _options(given: list[str] | None) -> Mapping[str, float]:
    """`["ratio=3"]` -> `{"ratio": 3.0}`."""
    options = {}
    for item in given or ():
        name, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise InputError(f"--set {item} is not legal; it must be NAME=NUMBER, such as ratio=3.") from None
        if name in options:
            raise InputError(f"--set gives {name} twice.")
        options[name] = number
    return options


def _check_source(ctx: typer.Context, remove: float | None, file: Path | None, flag: str) -> None:
    """Exactly one of --remove and the file of ranks; and beside a file nothing that it makes meaningless."""
    if (remove is None) == (file is None):
        raise typer.BadParameter("exactly one of them must be given.", ctx=ctx, param_hint=f"--remove or {flag}")
    if file is not None:
        _check_alone(ctx, f"{flag}: the file has the ranks", _PLANNING)


def _check_alone(ctx: typer.Context, flag: str, others: Sequence[str]) -> None:
    """Refuse options of the command line that `flag` makes meaningless."""
    for name in others:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            hint = "--set" if name == "options" else "--" + name.replace("_", "-")
            raise typer.BadParameter(f"it does not go with {flag}.", ctx=ctx, param_hint=hint)


def main() -> None:
    """Entry point.

    Exit codes: 0 done, 1 failed, 2 bad input or usage, 3 store, 4 non-finite numbers, 5 writing, 130 interrupted.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with exit_codes():
        app()
