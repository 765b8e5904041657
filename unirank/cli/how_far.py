"""The command that measures how far one can go: `unirank curve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from unirank.cli import options
from unirank.cli.amounts import read_fraction
from unirank.cli.arguments import read_calibration, read_form
from unirank.cli.endings import next_line
from unirank.cli.terminal import run_session
from unirank.errors import InputError

if TYPE_CHECKING:
    from unirank.evaluation.measured_curve import Curve

_TEXT = "Text"


def curve_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="STORE|MODEL",
            help="The dense model: directory, hub name, or 'smollm2-135m' (embedded); its analyses are made in OUT. Or "
            "a store that `unirank analyze` made; then --against is the model.",
            show_default=False,
        ),
    ],
    text: Annotated[
        list[str] | None,
        options.option(
            f"Perplexity on this text: {options.TEXT_HELP}. Repeatable; the first one says where points are added. "
            f"Default: {options.BUILTIN_HELD_OUT!r}, the held-out part of Python's documentation."
        ),
    ] = None,
    preset: Annotated[
        list[str] | None, options.option("A preset, see `unirank compress`. Repeatable. Default: unirank.")
    ] = None,
    remove: Annotated[
        list[str] | None,
        options.option(
            f"{options.REMOVE_HELP} Or PRESET=0.2,0.4: of this preset, those alone. Repeatable. Default: 0, 0.01, "
            "0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5 and 0.6.",
            "--remove",
            "-r",
        ),
    ] = None,
    more: Annotated[
        int, options.option("At most so many more points a preset, where its curve bends; 0 adds none.")
    ] = 3,
    against: options.Against = None,
    speed: Annotated[
        bool, options.option("Also measure tokens a second, on a machine that does nothing else.", "--speed")
    ] = False,
    text_window: Annotated[
        int | None,
        options.option("Tokens a window of the texts. Default: 1024, or the model's positions.", group=_TEXT),
    ] = None,
    text_limit: Annotated[
        int | None, options.option("Use the first so many windows of each text. Default: all.", group=_TEXT)
    ] = None,
    text_split: Annotated[
        str | None,
        options.option("Split of a dataset. Default: its own for perplexity, test where unknown.", group=_TEXT),
    ] = None,
    calib: options.Calib = None,
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
    min_rank: options.MinRank = 1,
    multiple_of: options.MultipleOf = None,
    form: options.Form = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    model_revision: options.ModelRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path, options.out("Directory of the curve, its points and analyses; a second run goes on from there.")
    ] = Path("unirank-curve"),
    png: Annotated[
        bool, options.option("Also draw curve.png (needs the extra `plot`).", "--png", group="Output")
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """How far can one go: perplexity and sizes over the removed fraction, for one preset or several. Resumable."""
    from unirank.analysis.store import MANIFEST
    from unirank.tradeoff.picture import check_picture, write_curve
    from unirank.tradeoff.sweep import curve

    with run_session(as_json) as session:
        store = Path(model) if (Path(model) / MANIFEST).is_file() else None
        if store is not None and against is None:
            raise InputError(
                f"{model} is a store, which knows its model by hash only; give the dense model with --against."
            )
        if store is None and against is not None:
            raise InputError(f"--against is the dense model of a store; {model} is none: leave --against out.")
        check_picture(png=png)
        calibration = read_calibration(
            calib, calib_shares, windows, window, seed, batch, gradients, clip, shrink, precision, split, text_revision
        )
        dense = model if against is None else against
        presets = preset or ["unirank"]
        found = curve(
            dense,
            store=store,
            presets=presets,
            remove=read_ladders(remove, presets),
            more=more,
            texts=text or (options.BUILTIN_HELD_OUT,),
            window=text_window,
            limit=text_limit,
            split=text_split,
            place=out,
            calibration=calibration,
            form=read_form(form),
            min_rank=min_rank,
            multiple_of=multiple_of,
            speed=speed,
            dtype=dtype,
            device=device,
            revision=model_revision,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=session.progress,
        )
        files = write_curve(found, out, png=png)
        session.show({"out": str(out)} | found.as_dict(), *curve_view(found, files, dense, out, store, calib))


def read_ladders(given: list[str] | None, presets: list[str]) -> dict[str, list[float]] | None:
    """`["0.1", "fast=0.2,0.4"]` -> fractions by preset: those without a name are of all presets that are not named."""
    if given is None:
        return None
    usual: list[float] = []
    named: dict[str, list[float]] = {}
    for one in given:
        name, equals, numbers = one.rpartition("=")
        try:
            (named.setdefault(name, []) if equals else usual).extend(map(read_fraction, numbers.split(",")))
        except ValueError:
            raise InputError(f"--remove {one} is not legal; it is a fraction, 0.2 or 20%, or PRESET=0.2,0.4.") from None
    return (dict.fromkeys(presets, usual) if usual else {}) | named


def curve_view(
    curve: Curve, files: list[Path], model: str, out: Path, store: Path | None, calib: str | None
) -> list[Any]:
    """The table, what has to be said beside it, where the files are, and what comes next."""
    from unirank.tradeoff.showing import head_of, notes_of, rows_of

    table = Table(title=f"how far can one go: {curve.model}", title_justify="left")
    for index, column in enumerate(head_of(curve)):
        table.add_column(column, justify="left" if index == 0 else "right")
    last = None
    for row in rows_of(curve):
        if last not in (None, row[0]):
            table.add_section()
        table.add_row(*row)
        last = row[0]
    best = curve.points[-1].preset
    from unirank.recipes import preset as preset_of

    place = store or out / f"analysis-{preset_of(best).scheme}"
    command: list[object] = ["compress", model, "-o", "OUT", "--preset", best, "--store", place]
    command += ["--remove", f"{next(point.remove for point in curve.points if point.preset == best):g}"]
    if calib is not None and preset_of(best).needs_tokens:
        command += ["--calib", calib]
    return [table, *notes_of(curve), f"Written: {', '.join(map(str, files))}.", next_line(*command)]
