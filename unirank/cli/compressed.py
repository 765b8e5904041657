"""The commands that go on from a compressed checkpoint: `unirank finetune`, `quantize`, `densify`, `report`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from unirank.cli import endings, options, views
from unirank.cli.arguments import keep_source
from unirank.cli.terminal import run_session
from unirank.errors import InputError
from unirank.finetuning.settings import Finetune

_D = Finetune()
_TRAINING, _ADAPTERS, _HELD_OUT = "Training", "Adapters", "Held-out text"


def finetune_command(
    model: options.Compressed,
    text: Annotated[
        str,
        options.option(
            "Training text: a UTF-8 file; records as .jsonl or .parquet (text, messages, prompt and completion, "
            "or instruction and output); a directory or hub name for `datasets`, where needed as NAME:CONFIGURATION."
        ),
    ],
    out: Annotated[Path, options.out("Directory of the fine-tuned checkpoint.")],
    steps: Annotated[int, options.option("Optimizer steps.")] = _D.steps,
    against: Annotated[
        str | None,
        options.option("The dense model, the teacher of --distill. Default: the one the checkpoint says it came from."),
    ] = None,
    split: Annotated[str | None, options.option("Split of a dataset. Default: train.", group=_TRAINING)] = None,
    batch: Annotated[int, options.option("Windows a step.", group=_TRAINING)] = _D.batch,
    micro_batch: Annotated[
        int | None,
        options.option("Windows that run at once; fewer need less memory. Default: all of a step.", group=_TRAINING),
    ] = _D.micro_batch,
    window: Annotated[int, options.option("Tokens a window; documents are packed.", group=_TRAINING)] = _D.window,
    lr: Annotated[float, options.option("Peak learning rate.", group=_TRAINING)] = _D.lr,
    warmup: Annotated[
        float, options.option("Fraction of the steps in which the rate rises.", group=_TRAINING)
    ] = _D.warmup,
    weight_decay: Annotated[float, options.option("Weight decay of the adapters.", group=_TRAINING)] = _D.weight_decay,
    distill: Annotated[
        float,
        options.option("Share of the loss that is the divergence from the dense model, 0 to 1.", group=_TRAINING),
    ] = _D.distill,
    temperature: Annotated[float, options.option("Of that divergence.", group=_TRAINING)] = _D.temperature,
    seed: Annotated[int, options.option("Seed of adapters and order.", group=_TRAINING)] = _D.seed,
    rank: Annotated[int, options.option("Rank of the adapters (the factors keep theirs).", group=_ADAPTERS)] = _D.rank,
    alpha: Annotated[
        float | None, options.option("Adapters count alpha / rank. Default: twice the rank.", group=_ADAPTERS)
    ] = _D.alpha,
    schedule: Annotated[str, options.option("joint, or left-then-right (SVD-LLM's).", group=_ADAPTERS)] = _D.schedule,
    adapt_dense: Annotated[
        bool, options.option("Also adapt the linears that stayed dense.", "--adapt-dense", group=_ADAPTERS)
    ] = _D.adapt_dense,
    held_out: Annotated[
        float, options.option("Fraction of the windows that is not trained on.", group=_HELD_OUT)
    ] = _D.held_out,
    evaluate_every: Annotated[
        int | None,
        options.option("Steps between looks at the held-out loss, and checkpoints. Default: a tenth.", group=_HELD_OUT),
    ] = _D.evaluate_every,
    patience: Annotated[
        int, options.option("Looks without improvement that end it; 0: never.", group=_HELD_OUT)
    ] = _D.patience,
    gradient_checkpointing: Annotated[
        bool, options.option("Less memory for more time.", "--gradient-checkpointing", group="Model")
    ] = _D.gradient_checkpointing,
    precision: Annotated[
        str,
        options.option("Of the arithmetic: float32, bfloat16, or auto (bfloat16 on GPUs that have it).", group="Model"),
    ] = _D.precision,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    work: Annotated[
        Path | None,
        options.option(
            "Keep training checkpoints here. Default: OUT with -training appended, deleted at the end.",
            group="Output",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a compressed checkpoint with LoRA on its factors. Ranks stay; an interrupted run resumes."""
    from unirank.compression.card import PLAN_FILE
    from unirank.compression.checkpoint import open_compressed
    from unirank.disk.files import beside, check_output
    from unirank.finetuning.tuning import finetune

    with run_session(as_json) as session:
        chosen: dict[str, Any] = {"schedule": schedule, "precision": precision}
        settings = Finetune(
            steps=steps,
            batch=batch,
            micro_batch=micro_batch,
            window=window,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            rank=rank,
            alpha=alpha,
            adapt_dense=adapt_dense,
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
        keep_source(out, model, "that is fine-tuned")
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        with session.stage("load"):
            compressed = open_compressed(model, dtype=dtype, device=device, **trust)
        folder = work or beside(out, "-training")
        tuned = finetune(
            compressed, text, settings, work=folder, against=against, split=split, **trust, progress=session.progress
        )
        with session.stage("save"):
            tuned.save(out, overwrite=overwrite)
        if work is None:
            shutil.rmtree(folder)
        record = {"out": str(out), "report": tuned.report.as_dict(), "training": dict(tuned.training or {})}
        record |= endings.saved_sizes(tuned, out)
        lines = [*views.finetune_view(tuned, out), endings.sizes_line(record)]
        session.show(record, *lines, endings.after_training(out, tuned.source, model))


def quantize_command(
    model: options.Compressed,
    out: Annotated[Path, options.out("Directory of the quantised checkpoint.")],
    bits: Annotated[int, options.option("Bits of a weight: 8 or 4.")] = 8,
    group_size: Annotated[
        int | None,
        options.option(
            "The most weights that share a scale: 128, 64, 32 or 16. Default: 128 with 4 bits; with 8 a row's, "
            "or 32 of a pivoted model."
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write the same model with weights of 8 or 4 bits (torchao, the extra `quantize`). The last step of all."""
    from unirank.compression.card import PLAN_FILE
    from unirank.compression.checkpoint import open_compressed
    from unirank.compression.quantization import check_quantizable, quantize
    from unirank.disk.files import check_output

    with run_session(as_json) as session:
        check_quantizable(bits, group_size)
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        keep_source(out, model, "that is quantised")
        with session.stage("load"):
            compressed = open_compressed(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        made = quantize(compressed, bits, group_size=group_size, progress=session.progress)
        with session.stage("save"):
            made.save(out, overwrite=overwrite)
        assert made.quantized is not None
        record = {"out": str(out), "quantized": made.quantized.as_dict()} | endings.saved_sizes(made, out)
        lines = [f"{made.quantized.described()}.", *views.load_hint([out]), endings.sizes_line(record)]
        session.show(record, *lines, endings.next_line("eval", out, "--against", model))


def densify_command(
    model: options.Compressed,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the plain checkpoint.")],
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a plain checkpoint of the original class, as large as the original, for tools without unirank."""
    from unirank.compression.card import PROVENANCE_FILE
    from unirank.compression.checkpoint import open_compressed, read_record
    from unirank.compression.densified import densify, save_dense
    from unirank.disk.files import check_output
    from unirank.models.low_rank import count_parameters

    with run_session(as_json) as session:
        check_output(out, marker=PROVENANCE_FILE, overwrite=overwrite)
        keep_source(out, model, "itself")
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        stream = read_record(Path(model), **trust).quantized is None  # which is read as a whole
        with session.stage("load"):
            compressed = open_compressed(model, dtype=dtype, device=device, **trust, stream=stream)
        densify(compressed.model, pages=compressed.pages, progress=session.progress)
        with session.stage("save"):
            save_dense(compressed, out, overwrite=overwrite)
        count = count_parameters(compressed.model)
        record = {"out": str(out), "class": type(compressed.model).__name__, "parameters": count}
        record |= endings.grown_sizes(Path(model), out)
        told = f"{record['class']} of {count:,} parameters written to {out}; it needs no unirank to load."
        following = endings.next_line("eval", out, "--against", model)
        session.show(record, told, endings.sizes_line(record, was="compressed"), following)


def report_command(
    model: options.Compressed,
    out: Annotated[Path | None, options.out("The page to write. Default: COMPRESSED with .html appended.")] = None,
    against: Annotated[str | None, options.option("The dense model, for texts side by side.")] = None,
    prompts: Annotated[
        list[str] | None,
        options.option("With --against: continue this; repeatable. Default: three.", "--prompt"),
    ] = None,
    store: Annotated[
        Path | None,
        options.option("Its analysis store, for cosines and spectra. Default: COMPRESSED-analysis, if there."),
    ] = None,
    grid: Annotated[
        Path | None, options.option("JSON of `unirank demo` or bench_quality.py, for perplexities.")
    ] = None,
    curve: Annotated[
        Path | None,
        options.option(
            "A curve.json of the same dense model, to show this checkpoint on. Default: COMPRESSED-curve/curve.json, "
            "if there."
        ),
    ] = None,
    plots: Annotated[
        Path | None,
        options.option(
            "Also write the charts into this directory, as PNG and SVG (needs the extra `plot`).", group="Output"
        ),
    ] = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """One self-contained HTML page about a compressed checkpoint: what it cost, warnings, ranks, and how to make it."""
    from unirank.analysis.store import open_store
    from unirank.report.plots import check_plots, save_plots
    from unirank.report.write import PROMPTS, usual_curve, usual_page, usual_store, write_report

    with run_session(as_json, models=against is not None) as session:
        if prompts and against is None:
            raise InputError("--prompt needs --against: the texts stand side by side.")
        if plots is not None:
            check_plots(plots, overwrite=overwrite)
        checkpoint = Path(model)
        where = store or usual_store(checkpoint)
        page = out or usual_page(checkpoint)
        analysis = open_store(where) if where is not None else None
        data = write_report(
            checkpoint,
            page,
            store=analysis,
            grid=grid,
            curve=curve or usual_curve(checkpoint),
            against=against,
            prompts=prompts or PROMPTS,
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
        drawn = [] if plots is None else save_plots(data, plots, overwrite=overwrite)
        size = page.stat().st_size
        note = (
            "" if analysis is not None else " Cosines and spectra are not in it: no analysis store was given (--store)."
        )
        record = {"out": str(page), "bytes": size, "plots": [str(file) for file in drawn]}
        also = f" {len(drawn)} charts are in {plots}." if drawn else ""
        written = f"Written: {page} ({size / 1e3:,.0f} kB).{note}{also}"
        session.show(record, written, endings.after_looking(model, against, None))
