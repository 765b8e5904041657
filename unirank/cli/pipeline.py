"""The commands that make something of a dense model: `unirank demo`, `analyze`, `plan` and `compress`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unirank.cli import options, views
from unirank.cli.terminal import Session, run_session
from unirank.errors import InputError

if TYPE_CHECKING:
    from unirank.analysis.calibration import Calibration
    from unirank.analysis.needs import Needs
    from unirank.recipes import Preset
    from unirank.types import Form

# What shapes a plan, so that it has no meaning beside one that is read from a file.
_PLANNING = (
    *("preset", "allocator", "set_", "min_rank", "multiple_of"),
    *("importance", "distance", "gamma", "local", "per_parameter"),
)


def demo_command(
    out: Annotated[Path, options.out("Directory for store, checkpoints and demo.json.")] = Path("unirank-demo"),
    remove: Annotated[
        list[float] | None, options.option(options.REMOVE_HELP + " Repeatable.", "--remove", "-r")
    ] = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """The main job on the embedded default: SmolLM2-135M, uniform ranks against UniRank, dense in the same table."""
    from unirank.cli.demo import demo

    with run_session(as_json) as session:
        result = demo(out, remove=remove or (0.2, 0.4), device=device, progress=session.progress)
        session.show(views.demo_record(result), *views.demo_view(result))


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
    split: options.Split = None,
    text_revision: options.TextRevision = None,
    scheme: options.Scheme = None,
    stream: options.Stream = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    model_revision: options.ModelRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Calibrate and decompose every layer, once for all ratios. Expensive; an interrupted run resumes."""
    import unirank

    with run_session(as_json, parallel=True) as session:
        calibration = _calibration(
            calib, calib_shares, windows, window, seed, batch, gradients, clip, split, text_revision
        )
        asked: dict[str, Any] = {"preset": preset, "scheme": scheme, "calibration": calibration, "stream": stream}
        asked |= {"dtype": dtype, "device": device, "revision": model_revision, "trust_remote_code": trust_remote_code}
        asked["progress"] = session.progress
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
        }
        session.show(
            record,
            views.cosine_table(store),
            *views.damping_summary(store),
            f"Store: {out}. Next: unirank plan {out} --remove 0.2{_measuring(preset, model, calib)}",
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
    multiple_of: options.MultipleOf = 1,
    form: options.Form = None,
    importance: options.Importance = None,
    distance: options.Distance = None,
    gamma: options.Gamma = None,
    local: options.Local = None,
    per_parameter: options.PerParameter = False,
    device: options.Device = None,
    out: Annotated[Path | None, options.out("Also write the plan to this JSON file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Ranks for an exact budget from a finished store. Any ratio, any allocator; most load no model."""
    import unirank
    from unirank.disk.files import write_text

    with run_session(as_json, models=against is not None) as session:
        _check_source(ctx, remove, ranks)
        _check_preset(ctx, preset, _PLANNING)
        chosen = unirank.plan(
            store,
            remove,
            ranks=ranks,
            preset=preset,
            allocator=allocator,
            settings=_settings(importance, distance, gamma, local, per_parameter),
            options=_options(set_),
            min_rank=min_rank,
            multiple_of=multiple_of,
            form=_form(form),
            against=against,
            calibration=calib,
            device=device,
            progress=session.progress,
        )
        written = []
        if out is not None:
            write_text(out, chosen.to_json())
            written.append(f"Written to {out}.")
        if preset is not None:
            written += views.afterwards_hint(unirank.recipe(preset))
        session.show(json.loads(chosen.to_json()), views.plan_table(chosen), views.plan_summary(chosen), *written)


def compress_command(
    ctx: typer.Context,
    model: options.Model,
    out: Annotated[Path, options.out("Directory of the compressed checkpoint.")],
    remove: options.Remove = None,
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
    split: options.Split = None,
    text_revision: options.TextRevision = None,
    scheme: options.Scheme = None,
    refine: options.Refine = None,
    refine_damping: options.RefineDamping = None,
    refine_metric: options.RefineMetric = False,
    refine_metric_damping: options.RefineMetricDamping = None,
    refine_centred: options.RefineCentred = False,
    refine_dense: options.RefineDense = False,
    heal: options.Heal = False,
    allocator: options.Allocator = None,
    set_: options.Set = None,
    min_rank: options.MinRank = 1,
    multiple_of: options.MultipleOf = 1,
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
        options.option("Also write the page of `unirank report`, OUT with .html appended.", "--report", group="Output"),
    ] = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Analyze, plan, truncate and save a checkpoint that transformers loads after `import unirank`."""
    from unirank.api import dry_run as needs_of
    from unirank.compression.card import PLAN_FILE
    from unirank.disk.files import beside, check_output
    from unirank.finetuning.settings import Heal
    from unirank.job import Job
    from unirank.recipes import recipe as recipe_of
    from unirank.report.write import check_page, write_report

    with run_session(as_json, parallel=True) as session:
        _check_source(ctx, remove, ranks)
        second = _refine(refine, refine_damping, refine_metric, refine_metric_damping, refine_centred, refine_dense)
        _check_preset(ctx, preset, _PLANNING)
        recipe: Preset = recipe_of(
            preset,
            scheme=scheme,
            allocator=allocator,
            settings=_settings(importance, distance, gamma, local, per_parameter),
            options=_options(set_),
            refine=second,
            heal=Heal() if heal else None,
        )
        job = Job(
            remove=remove,
            ranks=ranks,
            recipe=recipe,
            min_rank=min_rank,
            multiple_of=multiple_of,
            calibration=_calibration(
                calib, calib_shares, windows, window, seed, batch, gradients, clip, split, text_revision
            ),
            scheme_is_free=preset is None and scheme is None,
            form=_form(form),
            progress=session.progress,
        )
        loading = {"dtype": dtype, "device": device, "revision": model_revision}
        loading |= {"trust_remote_code": trust_remote_code, "stream": stream}
        place = store or beside(out, "-analysis")
        job.check(stream=stream, dry_run=dry_run)
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        if report:
            check_page(beside(out, ".html"), overwrite=overwrite)
        if dry_run:
            asked: dict[str, Any] = {"scheme": recipe.scheme, "calibration": job.calibration, "remove": remove or 0.0}
            _show_needs(session, needs_of(model, place, progress=session.progress, **asked, **loading))
            return
        # A store that the user named is never replaced in passing.
        replace = overwrite and store is None
        work = beside(out, "-healing")
        compressed = job.run(model, place, overwrite=replace, first_alone=True, work=work, **loading)
        if compressed is None:
            return
        compressed.save(out, overwrite=overwrite)
        if recipe.heal is not None:
            shutil.rmtree(work)
        record: dict[str, Any] = {"out": str(out), "store": str(place), "report": compressed.report.as_dict()}
        record |= {"budget": compressed.plan.budget, "used": compressed.plan.used}
        lines = views.compress_view(compressed, out, place)
        if report:
            from unirank.analysis.store import open_store

            page = beside(out, ".html")
            write_report(out, page, store=open_store(place), overwrite=overwrite)
            record["page"] = str(page)
            lines.append(f"Report: {page}")
        session.show(record, *lines)


def _measuring(preset: str | None, model: str, calib: str | None) -> str:
    """The options that `unirank plan` takes for a preset whose allocator runs the dense model."""
    from unirank.recipes import preset as preset_of

    if preset is None:
        return ""
    more = f" --against {model}" + (f" --calib {calib}" if calib else "") if preset_of(preset).measures else ""
    return f" --preset {preset}{more}"


def _show_needs(session: Session, found: Needs) -> None:
    """Print it; raises InputError, after that, where the run cannot fit."""
    session.show(found.as_dict(), *views.needs_view(found))
    found.require_fit()


def _calibration(
    text: str | None,
    shares: str | None,
    windows: int | None,
    window: int | None,
    seed: int | None,
    batch: int | None,
    gradients: int | None,
    clip: float | None,
    split: str | None,
    revision: str | None,
) -> Calibration | str | None:
    """What was said about calibration; None where nothing was, so that a finished store is taken as it is."""
    from unirank.analysis.calibration import Calibration

    given = {"text": text, "windows": windows, "window": window, "seed": seed, "batch": batch}
    given["shares"] = None if shares is None else read_shares(shares)
    given |= {"gradient_windows": gradients, "clip": clip, "split": split, "revision": revision}
    given = {name: value for name, value in given.items() if value is not None}
    if given.keys() == {"text"}:
        return text  # a text alone goes with a finished store of it
    return Calibration(**given) if given else None  # pyright: ignore[reportArgumentType] - each has its own type


def _form(name: str | None) -> Form | None:
    from unirank.rank_plan import check_form

    return None if name is None else check_form(name)


def read_shares(given: str) -> list[float]:
    """`"3,1"` -> `[3.0, 1.0]`; what a share may be is the library's matter."""
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise InputError(f"--calib-shares {given} is not legal; it is a number for each text, such as 3,1.") from None


def _settings(
    importance: str | None, distance: str | None, gamma: float | None, local: str | None, per_parameter: bool
) -> Any:
    """Score settings; None where all are UniRank's."""
    given = {"importance": importance, "distance": distance, "gamma": gamma, "local": local}
    given = {name: value for name, value in given.items() if value is not None}
    if not given and not per_parameter:
        return None
    from unirank.planning.score import ScoreSettings

    return ScoreSettings(**given, per_parameter=per_parameter)  # pyright: ignore[reportArgumentType] - it checks them


def _refine(
    mix: float | None,
    damping: float | None,
    metric: bool,
    metric_damping: float | None,
    centred: bool,
    dense: bool,
) -> Any:
    """The second pass; None without --refine, which the others need."""
    more = {"damping": damping, "metric": metric or None, "metric_damping": metric_damping}
    more |= {"centred": centred or None, "dense": dense or None}
    more = {name: value for name, value in more.items() if value is not None}
    if mix is None:
        if more:
            raise InputError(f"--refine-{next(iter(more)).replace('_', '-')} needs --refine MIX.")
        return None
    from unirank.compression.refine import Refine

    return Refine(mix=mix, **more)  # pyright: ignore[reportArgumentType] - it checks them


def _options(given: list[str] | None) -> dict[str, float] | None:
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
    return options or None


def _check_source(ctx: typer.Context, remove: float | None, file: Path | None) -> None:
    """Exactly one of --remove and --ranks; and beside a file nothing that it makes meaningless."""
    if (remove is None) == (file is None):
        raise typer.BadParameter("exactly one of them must be given.", ctx=ctx, param_hint="--remove or --ranks")
    if file is not None:
        _check_alone(ctx, "--ranks: the file has the ranks", _PLANNING)


def _check_preset(ctx: typer.Context, preset: str | None, others: tuple[str, ...]) -> None:
    """Beside --preset nothing that it sets."""
    if preset is not None:
        free = ("preset", "min_rank", "multiple_of")
        _check_alone(ctx, "--preset", ("scheme", "refine", "heal", *(name for name in others if name not in free)))


def _check_alone(ctx: typer.Context, flag: str, others: tuple[str, ...]) -> None:
    """Refuse options of the command line that `flag` makes meaningless."""
    for name in others:
        source = ctx.get_parameter_source(name) if name in ctx.params else None
        if source is not None and source.name == "COMMANDLINE":
            hint = "--set" if name == "set_" else "--" + name.replace("_", "-")
            raise typer.BadParameter(f"it does not go with {flag}.", ctx=ctx, param_hint=hint)
