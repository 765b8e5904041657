"""The commands that go on from a compressed checkpoint: `unirank finetune`, `unirank densify`, `unirank report`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from unirank.analysis.store import MANIFEST, open_store
from unirank.cli import options as flags
from unirank.cli import views as tables
from unirank.cli.terminal import run_session
from unirank.compression.checkpoint import PLAN_FILE, PROVENANCE_FILE, open_compressed
from unirank.compression.densified import densify, save_dense
from unirank.disk.files import beside, check_output
from unirank.errors import InputError
from unirank.finetuning.tuning import Finetune, finetune
from unirank.models.low_rank import count_parameters
from unirank.report.plots import check_plots, save_plots
from unirank.report.write import PROMPTS, write_report

_D = Finetune()


def finetune_command(
    model: Annotated[str, typer.Argument(metavar="COMPRESSED", help="Checkpoint that `unirank compress` made.")],
    data: Annotated[
        str,
        typer.Option(
            help="Training text: a UTF-8 file; records as .jsonl or .parquet (text, messages, prompt and completion, "
            "or instruction and output); a directory or hub name for `datasets`, where needed as NAME:CONFIGURATION."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the fine-tuned checkpoint.")],
    split: Annotated[str | None, typer.Option(help="Split of a dataset. Default: train.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = _D.steps,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = _D.batch,
    micro_batch: Annotated[
        int | None, typer.Option(help="Windows that run at once; fewer need less memory. Default: all of a step.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window; documents are packed.")] = _D.window,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = _D.lr,
    rank: Annotated[int, typer.Option(help="Rank of the adapters (the factors keep theirs).")] = _D.rank,
    alpha: Annotated[float | None, typer.Option(help="Adapters count alpha / rank. Default: twice the rank.")] = None,
    schedule: Annotated[str, typer.Option(help="joint, or left-then-right (SVD-LLM's).")] = _D.schedule,
    dense: Annotated[bool, typer.Option("--dense", help="Also adapt the linears that stayed dense.")] = False,
    distill: Annotated[
        float, typer.Option(help="Share of the loss that is the divergence from the dense model, 0 to 1.")
    ] = _D.distill,
    temperature: Annotated[float, typer.Option(help="Of that divergence.")] = _D.temperature,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model; default: the one the checkpoint says it came from.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Fraction of the windows that is not trained on.")] = _D.held_out,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between looks at the held-out loss, and checkpoints. Default: a tenth.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Looks without improvement that end it; 0: never.")] = _D.patience,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="Of the arithmetic: float32, bfloat16, or auto (bfloat16 on GPUs that have it).")
    ] = _D.precision,
    seed: Annotated[int, typer.Option(help="Seed of adapters and order.")] = _D.seed,
    work: Annotated[
        Path | None,
        typer.Option(help="Keep training checkpoints here. Default: OUT with -training appended, deleted at the end."),
    ] = None,
    dtype: flags.Dtype = "auto",
    device: flags.Device = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
) -> None:
    """Fine-tune a compressed checkpoint with LoRA on its factors. Ranks stay; an interrupted run resumes."""
    with run_session(as_json) as session:
        chosen: dict[str, Any] = {"schedule": schedule, "precision": precision}
        settings = Finetune(
            steps=steps,
            batch=batch,
            micro_batch=micro_batch,
            window=window,
            lr=lr,
            rank=rank,
            alpha=alpha,
            adapt_dense=dense,
            distill=distill,
            temperature=temperature,
            held_out=held_out,
            evaluate_every=evaluate_every,
            patience=patience,
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            **chosen,
        )
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        if out.resolve() == Path(model).resolve():
            raise InputError(f"The output {out} is the checkpoint that is fine-tuned; choose another.")
        compressed = open_compressed(model, dtype=dtype, device=device)
        folder = work or beside(out, "-training")
        tuned = finetune(
            compressed, data, settings, work=folder, teacher=teacher, split=split, progress=session.progress
        )
        tuned.save(out, overwrite=overwrite)
        if work is None:
            shutil.rmtree(folder)
        record = {"out": str(out), "report": tuned.report.as_dict(), "training": dict(tuned.training or {})}
        session.show(record, *tables.finetune_view(tuned, out))


def densify_command(
    model: Annotated[str, typer.Argument(metavar="COMPRESSED", help="Checkpoint that `unirank compress` made.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the plain checkpoint.")],
    dtype: flags.Dtype = "auto",
    device: flags.Device = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
) -> None:
    """Write a plain checkpoint of the original class, as large as the original, for tools without unirank."""
    with run_session(as_json) as session:
        check_output(out, marker=PROVENANCE_FILE, overwrite=overwrite)
        if out.resolve() == Path(model).resolve():
            raise InputError(f"The output {out} is the checkpoint itself; choose another.")
        compressed = open_compressed(model, dtype=dtype, device=device, stream=True)
        densify(compressed.model, pages=compressed.pages, progress=session.progress)
        save_dense(compressed, out, overwrite=overwrite)
        count = count_parameters(compressed.model)
        record = {"out": str(out), "class": type(compressed.model).__name__, "parameters": count}
        session.show(
            record, f"{record['class']} of {count:,} parameters written to {out}; it needs no unirank to load."
        )


def report_command(
    model: Annotated[Path, typer.Argument(metavar="COMPRESSED", help="Checkpoint that `unirank compress` made.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write. Default: COMPRESSED with .html appended.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Its analysis store, for cosines and spectra. Default: COMPRESSED-analysis, if there."),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="JSON of `unirank demo` or bench_quality.py, for perplexities.")
    ] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model, for texts side by side.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="With --dense: continue this; repeatable. Default: three.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(help="Also write the charts into this directory, as PNG and SVG (needs the extra `plot`)."),
    ] = None,
    device: flags.Device = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
) -> None:
    """One self-contained HTML page about a compressed checkpoint: ranks, cosines, spectra, and how to make it again."""
    with run_session(as_json) as session:
        if prompts and dense is None:
            raise InputError("--prompt needs --dense: the texts stand side by side.")
        if plots is not None:
            check_plots(plots, overwrite=overwrite)
        default = beside(model, "-analysis")
        where = store or (default if (default / MANIFEST).is_file() else None)
        page = out or beside(model, ".html")
        analysis = open_store(where) if where is not None else None
        data = write_report(
            model, page, store=analysis, grid=grid, dense=dense, prompts=prompts or PROMPTS, device=device
        )
        drawn = [] if plots is None else save_plots(data, plots, overwrite=overwrite)
        size = page.stat().st_size
        note = (
            "" if analysis is not None else " Cosines and spectra are not in it: no analysis store was given (--store)."
        )
        record = {"out": str(page), "bytes": size, "plots": [str(file) for file in drawn]}
        also = f" {len(drawn)} charts are in {plots}." if drawn else ""
        session.show(record, f"Written: {page} ({size / 1e3:,.0f} kB).{note}{also}")
