"""The commands that look and change nothing: `unirank diagnose`, `unirank eval`, `unirank info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from unirank.analysis.store import open_store
from unirank.cli import options as flags
from unirank.cli import views as tables
from unirank.cli.info import build_info
from unirank.cli.terminal import run_session
from unirank.compression.checkpoint import add_evaluation, check_weights, read_record
from unirank.diagnosis import plots as pictures
from unirank.diagnosis.claim import diagnose as run_diagnose
from unirank.errors import InputError
from unirank.evaluation.perplexity import evaluate, generate
from unirank.evaluation.tasks import Tasks, run_tasks
from unirank.models.loading import load, load_pretrained
from unirank.text.windows import BUILTIN, BUILTIN_HELD_OUT


def diagnose_command(
    store: Annotated[Path, typer.Argument(help="Directory that `unirank analyze` made.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that was analyzed. Adds the spectra of its weights, of its sublayers' outputs and "
            "of the streams that leave them; without it they are listed as not read."
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help=f"The calibration text of the store, for outputs and streams; default: {BUILTIN!r} where it "
            "is the store's."
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            help="Calibration windows to run for outputs and streams; take many more tokens than the stream is wide. "
            "Default: 8, or all of fewer."
        ),
    ] = None,
    permutations: Annotated[int, typer.Option(help="Random orders of a permutation test.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the permutation tests.")] = 0,
    device: flags.Device = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory for diagnose.json and scatter plots (needs the extra `plot`)."),
    ] = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
) -> None:
    """Does a high cosine between a sublayer's input and output go with a low effective rank? For every reading of it.

    Spearman's correlation with a permutation test, for the effective ranks of weights, whitened weights, sublayer
    outputs and streams; then the spectra, the geometry of the cosines, and the damping.
    """
    with run_session(as_json) as session:
        if out is not None:
            pictures.check_folder(out, overwrite=overwrite)
        analysis = open_store(store)
        analysis.require_complete()
        loaded = None
        if model is not None:
            loaded = load(model, dtype=analysis.identity["model"]["dtype"], device=device)
        found = run_diagnose(
            analysis,
            loaded,
            text=calib,
            windows=windows,
            permutations=permutations,
            seed=seed,
            progress=session.progress,
        )
        files = [] if out is None else pictures.save(found, out, overwrite=overwrite)
        session.show(found.as_dict(), *tables.diagnosis_view(found), *(f"Written: {file}" for file in files))


def evaluate_command(
    model: flags.Model,
    against: Annotated[str | None, typer.Option(help="Another model to put beside it, usually the dense one.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help=f"Perplexity on this: what --calib of analyze takes, or {BUILTIN_HELD_OUT!r} (the held-out part of "
            "Python's documentation). Default: the latter."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a dataset; default: its own for perplexity, test where unknown.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens a window. Default: 1024, or the model's positions.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use the first so many windows, or documents of each task; default: all.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Also continue this prompt, greedily.")] = None,
    card: Annotated[
        bool,
        typer.Option("--card", help="Write the perplexity into the model card of MODEL, a compressed checkpoint."),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Run these tasks of lm-eval in the place of perplexity: names, groups or tags, separated by commas "
            "(needs the extra `eval`)."
        ),
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="With --tasks: examples in the prompt. Default: each task's own number.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a directory of further task definitions (YAML).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="With --tasks: requests that run together. Default: 8.")] = None,
    dtype: flags.Dtype = "auto",
    device: flags.Device = None,
    as_json: flags.Json = False,
) -> None:
    """Perplexity, or tasks of lm-eval, of a dense or compressed model, with everything needed to compare it."""
    with run_session(as_json) as session:
        names = [model] if against is None else [against, model]
        if card:
            check_weights(Path(model), read_record(Path(model)))
        if tasks is not None:
            _refuse(
                {"--text": text, "--split": split, "--window": window, "--prompt": prompt, "--card": card or None},
                "is of perplexity; leave out --tasks",
            )
            chosen = Tasks([name.strip() for name in tasks.split(",")], include=include_path)
            options: dict[str, Any] = {"fewshot": fewshot, "limit": limit, "batch": 8 if batch is None else batch}
            records = []
            for name in names:
                network, tokenizer = load_pretrained(name, dtype=dtype, device=device)
                report = run_tasks(network, tokenizer, chosen, **options, progress=session.progress)
                records.append({"model": name} | report.as_dict())
            session.show({"rows": records}, tables.task_table(records))
            return
        _refuse({"--fewshot": fewshot, "--include-path": include_path, "--batch": batch}, "needs --tasks")
        records, reports = [], []
        for name in names:
            network, tokenizer = load_pretrained(name, dtype=dtype, device=device)
            report = evaluate(
                network,
                tokenizer,
                text=BUILTIN_HELD_OUT if text is None else text,
                window=window,
                limit=limit,
                split=split,
                stage=f"perplexity, {Path(name).name}",
                progress=session.progress,
            )
            reports.append(report)
            record = {"model": name} | report.as_dict()
            if prompt is not None:
                record["sample"] = generate(network, tokenizer, prompt)
            records.append(record)
        if card:
            add_evaluation(Path(model), reports[-1], dense=reports[0] if against else None)
        session.show({"rows": records}, tables.eval_table(records), *tables.samples(records))


def _refuse(options: dict[str, Any], reason: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} {reason}.")


def info_command(as_json: flags.Json = False) -> None:
    """Versions, devices, and what this build can do."""
    with run_session(as_json) as session:
        record = build_info()
        session.show(record, tables.info_table(record))
