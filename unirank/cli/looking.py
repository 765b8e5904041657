"""The commands that look and change no weights: `unirank diagnose`, `unirank eval`, `unirank info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from unirank.cli import endings, options, views
from unirank.cli.terminal import run_session
from unirank.errors import InputError

_TASKS = "Tasks of lm-eval (extra `eval`)"


def diagnose_command(
    store: options.Store,
    against: Annotated[
        str | None,
        options.option(
            "The model that was analyzed. Adds the spectra of its weights, of its sublayers' outputs and of the "
            "streams that leave them; without it they are listed as not read."
        ),
    ] = None,
    calib: Annotated[
        str | None,
        options.option(
            f"The calibration text of the store, for outputs and streams. Default: {options.BUILTIN!r} where it is the "
            "store's."
        ),
    ] = None,
    windows: Annotated[
        int | None,
        options.option(
            "Calibration windows to run for outputs and streams; take many more tokens than the stream is wide. "
            "Default: 8, or all of fewer."
        ),
    ] = None,
    permutations: Annotated[int, options.option("Random orders of a permutation test.")] = 10_000,
    seed: Annotated[int, options.option("Seed of the permutation tests.")] = 0,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path | None, options.out("Directory for diagnose.json and scatter plots (needs the extra `plot`).")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Does a high cosine between a sublayer's input and output go with a low effective rank? For every reading of it.

    Spearman's correlation with a permutation test, for the effective ranks of weights, whitened weights, sublayer
    outputs and streams; then the spectra, the geometry of the cosines, and the damping.
    """
    from unirank.analysis.store import open_store
    from unirank.diagnosis import plots
    from unirank.diagnosis.claim import diagnose
    from unirank.models.loading import load

    with run_session(as_json, models=against is not None) as session:
        if out is not None:
            plots.check_folder(out, overwrite=overwrite)
        analysis = open_store(store)
        analysis.require_complete()
        loaded = None
        if against is not None:
            dtype = analysis.identity.model.dtype
            loaded = load(against, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        found = diagnose(
            analysis,
            loaded,
            text=calib,
            windows=windows,
            permutations=permutations,
            seed=seed,
            progress=session.progress,
        )
        files = [] if out is None else plots.save(found, out, overwrite=overwrite)
        written = (f"Written: {file}" for file in files)
        following = endings.next_line("plan", store, "--remove", 0.2)
        session.show(found.as_dict(), *views.diagnosis_view(found), *written, following)


def evaluate_command(
    model: options.Model,
    against: Annotated[str | None, options.option("Another model to put beside it, usually the dense one.")] = None,
    text: Annotated[
        str | None,
        options.option(
            f"Perplexity on this text: {options.TEXT_HELP}; or {options.BUILTIN_HELD_OUT!r}, the held-out part of "
            "Python's documentation, which is the default."
        ),
    ] = None,
    window: Annotated[int | None, options.option("Tokens a window. Default: 1024, or the model's positions.")] = None,
    limit: Annotated[
        int | None, options.option("Use the first so many windows, or documents of each task. Default: all.")
    ] = None,
    split: Annotated[
        str | None, options.option("Split of a dataset. Default: its own for perplexity, test where unknown.")
    ] = None,
    prompt: Annotated[str | None, options.option("Also continue this prompt, greedily.")] = None,
    tasks: Annotated[
        str | None,
        options.option(
            "Run these tasks instead of perplexity: names, groups or tags, separated by commas.", group=_TASKS
        ),
    ] = None,
    fewshot: Annotated[
        int | None, options.option("Examples in the prompt. Default: each task's own number.", group=_TASKS)
    ] = None,
    include_path: Annotated[
        Path | None, options.option("A directory of further task definitions (YAML).", group=_TASKS)
    ] = None,
    batch: Annotated[int | None, options.option("Requests that run together. Default: 8.", group=_TASKS)] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    speed: Annotated[
        bool | None,
        options.option(
            "Tokens a second too, of all models in turns, so all are in memory at once. Default: with --against.",
            "--speed/--no-speed",
        ),
    ] = None,
    card: Annotated[
        bool,
        options.option(
            "Write the perplexity into the model card of MODEL, a compressed checkpoint.", "--card", group="Output"
        ),
    ] = False,
    record: Annotated[
        bool,
        options.option(
            "Keep the figures in MODEL, where that is a compressed checkpoint, beside its weights, and on its page.",
            "--record/--no-record",
            group="Output",
        ),
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Perplexity, or tasks of lm-eval, of a dense or compressed model, with everything needed to compare it."""
    from unirank.compression.checkpoint import check_card, check_weights, read_record
    from unirank.evaluation.side_by_side import measure
    from unirank.evaluation.tasks import Tasks, run_tasks
    from unirank.models.loading import load_pretrained
    from unirank.report.keeping import keep_evaluation

    with run_session(as_json) as session:
        names = [model] if against is None else [against, model]
        loading: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        if card:
            if not record:
                raise InputError("--card is of what is recorded; leave out --no-record.")
            check_weights(Path(model), read_record(Path(model), trust_remote_code=trust_remote_code))
            check_card(Path(model))
        if tasks is not None:
            _refuse(
                {"--text": text, "--split": split, "--window": window, "--prompt": prompt}
                | {"--card": card or None, "--speed": speed or None},
                "is of perplexity; leave out --tasks",
            )
            chosen = Tasks([name.strip() for name in tasks.split(",")], include=include_path)
            asked: dict[str, Any] = {"fewshot": fewshot, "limit": limit, "batch": 8 if batch is None else batch}
            records = []
            for name in names:
                with session.stage("load"):
                    network, tokenizer = load_pretrained(name, **loading)
                report = run_tasks(network, tokenizer, chosen, **asked, progress=session.progress)
                records.append({"model": name} | report.as_dict())
            session.show({"rows": records}, views.task_table(records), endings.after_tasks(model, against))
            return
        _refuse({"--fewshot": fewshot, "--include-path": include_path, "--batch": batch}, "needs --tasks")
        asked = {"text": options.BUILTIN_HELD_OUT if text is None else text, "window": window, "limit": limit}
        asked |= {"split": split, "prompt": prompt, "speed": speed, "loading": loading}
        found = measure(names, **asked, progress=session.progress)
        records = [{"model": name} | one for name, one in zip(names, found.as_dicts(), strict=True)]
        records = endings.with_ratio_and_size(records)
        shown: dict[str, Any] = {"rows": records, "notes": list(found.notes)}
        lines = [views.eval_table(records), *views.samples(records), *found.notes]
        if record:
            kept = keep_evaluation(Path(model), found, card=card, trust_remote_code=trust_remote_code)
            shown |= kept.as_dict() | {"notes": [*found.notes, *kept.notes]}
            lines += kept.lines(model)
            if kept.recorded and not card:
                lines.append("The model card stays as it is; --card writes the perplexity into it.")
        ratio = None if against is None else records[-1]["ratio"]
        session.show(shown, *lines, endings.after_looking(model, against, ratio))


def _refuse(given: dict[str, Any], reason: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} {reason}.")


def info_command(as_json: options.Json = False) -> None:
    """Versions, devices, and what this build can do."""
    from unirank.cli.info import build_info

    with run_session(as_json, models=False) as session:
        record = build_info()
        session.show(record, views.info_table(record), endings.next_line("demo"))
