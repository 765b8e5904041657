"""The command that chooses the preset too: `unirank auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unirank.cli import options
from unirank.cli.arguments import read_calibration, read_target
from unirank.cli.endings import after_compress, saved_sizes, sizes_line
from unirank.cli.reaching import reached_line, tried_table
from unirank.cli.terminal import run_session


def auto_command(
    ctx: typer.Context,
    model: options.Model,
    out: Annotated[Path, options.out("Directory of the compressed checkpoint.")],
    max_perplexity_increase: options.GoalIncrease = None,
    params: options.GoalParams = None,
    size: options.GoalSize = None,
    bits: options.Bits = None,
    text: Annotated[
        str | None,
        options.option(
            f"Perplexity on this text: {options.TEXT_HELP}. Default: the part of the calibration text that did not "
            "calibrate."
        ),
    ] = None,
    text_window: options.TextWindow = None,
    text_limit: Annotated[int | None, options.option("The first so many windows of the text. Default: all.")] = None,
    evaluations: Annotated[
        int | None, options.option("The most fractions that are measured with each preset. Default: 6.")
    ] = None,
    minutes: Annotated[
        float | None,
        options.option("What may be spent; presets that are not expected to fit are left out. Default: no end."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        options.option(
            "A preset to choose from. Repeatable. Default: unirank, fast and best; with --minutes, also healed and "
            "distilled, which train."
        ),
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
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    model_revision: options.ModelRevision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Choose preset and ratio for a target, compress, and write the report. Analyses and points stay in OUT-curve."""
    from unirank.compression.card import PLAN_FILE
    from unirank.disk.files import beside, check_output
    from unirank.report.cautions import built_in
    from unirank.report.keeping import write_usual_page
    from unirank.report.write import check_page, usual_page
    from unirank.tradeoff.automatic import auto
    from unirank.tradeoff.picture import write_curve

    with run_session(as_json) as session:
        given = (max_perplexity_increase, params, size)
        if sum(one is not None for one in given) != 1:
            hint = "--max-perplexity-increase, --params or --size"
            raise typer.BadParameter("exactly one of them must be given.", ctx=ctx, param_hint=hint)
        target = read_target(*given, bits, text, text_window, text_limit, evaluations)
        assert target is not None
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        check_page(usual_page(out), overwrite=overwrite, ours=True)
        place = beside(out, "-curve")
        calibration = read_calibration(
            calib, calib_shares, windows, window, seed, batch, gradients, clip, shrink, precision, split, text_revision
        )
        result = auto(
            model,
            target,
            place=place,
            minutes=minutes,
            presets=preset,
            calibration=calibration,
            dtype=dtype,
            device=device,
            revision=model_revision,
            trust_remote_code=trust_remote_code,
            progress=session.progress,
        )
        write_curve(result.curve, place)
        result.compressed.save(out, overwrite=overwrite)
        page = write_usual_page(out, result.store)
        sizes = saved_sizes(result.compressed, out)
        record: dict[str, Any] = {"out": str(out), "preset": result.preset, "store": str(result.store)}
        record |= {"tried": [one.as_dict() for one in result.tried], "seconds": result.seconds} | sizes
        record |= {"reached": result.reached.as_dict(), "page": page.as_dict()["page"], "notes": list(page.notes)}
        session.show(
            record,
            tried_table(result),
            f"Preset {result.preset}. {reached_line(result.reached)}",
            *built_in(result.compressed.identity),
            sizes_line(sizes, result.compressed.report.removed_of_targets),
            *page.lines(str(out)),
            f"{result.seconds / 60:.1f} minutes. Analyses and points are in {place}; delete it when you need no more.",
            after_compress(out, model, text, text_limit),
        )
