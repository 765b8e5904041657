"""The command that refines a compressed checkpoint block by block: `unirank heal`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

from unirank.cli import endings, options, views
from unirank.cli.arguments import keep_source, read_shares
from unirank.cli.terminal import run_session
from unirank.finetuning.settings import Heal

_D = Heal()
_TRAINING, _HELD_OUT, _DISTILLATION, _MODEL, _OUTPUT = "Training", "Held-out text", "Distillation", "Model", "Output"


def heal_command(
    model: options.Compressed,
    out: Annotated[Path, options.out("Directory of the healed checkpoint.")],
    against: Annotated[
        str | None,
        options.option("The dense model, whose layers are the aim. Default: the one the checkpoint says it came from."),
    ] = None,
    calib: options.Calib = None,
    calib_shares: options.CalibShares = None,
    text: Annotated[
        str | None,
        options.option("A second text, of which nothing is trained on; with it a layer must get better on both texts."),
    ] = None,
    store: Annotated[
        Path | None,
        options.option(
            "An analysis of the dense model with gradients: errors then count by what the loss feels of them."
        ),
    ] = None,
    windows: options.Windows = None,
    window: options.Window = None,
    seed: options.Seed = None,
    split: options.Split = None,
    text_revision: options.TextRevision = None,
    mix: Annotated[
        float,
        options.option(
            "1 aims at the dense model's stream, 0 at what dense layers make of the compressed one's.", group=_TRAINING
        ),
    ] = _D.mix,
    passes: Annotated[
        int, options.option("Passes over the windows, for every layer; 0: only distil.", group=_TRAINING)
    ] = _D.passes,
    batch: Annotated[
        int, options.option("Windows a step; fewer need less memory, and make more steps.", group=_TRAINING)
    ] = _D.batch,
    metric_damping: Annotated[
        float, options.option("Of --store's metric: the share that every direction has.", group=_TRAINING)
    ] = _D.metric_damping,
    lr: Annotated[
        float | None,
        options.option("Peak learning rate; by default by a layer's error, at most 1e-3.", group=_TRAINING),
    ] = _D.lr,
    warmup: Annotated[
        float, options.option("Fraction of a layer's steps in which the rate rises.", group=_TRAINING)
    ] = _D.warmup,
    weight_decay: Annotated[
        float, options.option("Weight decay of what is trained.", group=_TRAINING)
    ] = _D.weight_decay,
    held_out: Annotated[
        float, options.option("Fraction of the windows that is not trained on.", group=_HELD_OUT)
    ] = _D.held_out,
    patience: Annotated[
        int, options.option("Passes without improvement that end a layer; 0: never.", group=_HELD_OUT)
    ] = _D.patience,
    distill_steps: Annotated[
        int,
        options.option(
            "Then so many steps of the whole model, all factors at once, on the divergence from the dense model.",
            group=_DISTILLATION,
        ),
    ] = _D.distill_steps,
    distill_lr: Annotated[
        float | None,
        options.option(
            "Peak learning rate of these steps; by default by the distance from the dense model, at most 1e-4.",
            group=_DISTILLATION,
        ),
    ] = _D.distill_lr,
    distill_sampled: Annotated[
        float,
        options.option(
            "Share of these steps' windows that the dense model writes itself; the text gives the others.",
            group=_DISTILLATION,
        ),
    ] = _D.distill_sampled,
    precision: Annotated[
        str,
        options.option("Of the arithmetic: float32, bfloat16, or auto (bfloat16 on GPUs that have it).", group=_MODEL),
    ] = _D.precision,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    stream: options.Stream = False,
    work: Annotated[
        Path | None,
        options.option(
            "Keep finished layers here. Default: OUT with -healing appended, deleted at the end.", group=_OUTPUT
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Refine a compressed checkpoint layer by layer, by gradient. Ranks stay; an interrupted run resumes."""
    from unirank.analysis.calibration import Calibration
    from unirank.compression.card import PLAN_FILE
    from unirank.compression.checkpoint import open_compressed
    from unirank.disk.files import beside, check_output
    from unirank.finetuning.healing import heal
    from unirank.progress import Stopwatch

    with run_session(as_json) as session:
        chosen: dict[str, Any] = {"precision": precision}
        settings = Heal(
            mix=mix,
            passes=passes,
            batch=batch,
            metric_damping=metric_damping,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            held_out=held_out,
            patience=patience,
            distill_steps=distill_steps,
            distill_lr=distill_lr,
            distill_sampled=distill_sampled,
            **chosen,
        )
        given = {"text": calib, "windows": windows, "window": window, "seed": seed}
        given |= {"split": split, "revision": text_revision}
        given["shares"] = None if calib_shares is None else read_shares(calib_shares)
        calibration = Calibration(**{name: value for name, value in given.items() if value is not None})  # pyright: ignore[reportArgumentType] - each has its own type
        check_output(out, marker=PLAN_FILE, overwrite=overwrite)
        keep_source(out, model, "that is healed")
        watch = Stopwatch()
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        with session.stage("load"):
            compressed = open_compressed(model, dtype=dtype, device=device, stream=stream, **trust)
        folder = work or beside(out, "-healing")
        healed = heal(
            compressed,
            calibration,
            settings,
            work=folder,
            against=against,
            second_text=text,
            store=store,
            **trust,
            progress=session.progress,
        )
        with session.stage("save"):
            healed.save(out, overwrite=overwrite)
        if work is None:
            shutil.rmtree(folder)
        training = dict(healed.training or {})
        record = {"out": str(out), "report": healed.report.as_dict(), "training": training, "seconds": watch.lap()}
        record |= endings.saved_sizes(healed, out)
        lines = [*views.heal_view(healed, out, record["seconds"]), endings.sizes_line(record)]
        session.show(record, *lines, endings.after_training(out, healed.source, model))
